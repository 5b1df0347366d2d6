"""The launch helpers themselves: hung ranks are killed, the failing rank is shown, nothing is left for the next run."""

from __future__ import annotations

import os
import time

import pytest

from tests.launch import program, ranks, succeed

RANK = "import os, sys, time\nrank = int(os.environ['RANK'])\nprint(f'rank {rank} is here', flush=True)\n"


def _script(tmp_path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return str(tmp_path / "script.py")


def test_a_hung_rank_is_killed_at_the_limit_and_its_output_shown(tmp_path):
    hangs = RANK + f"open(r'{tmp_path}/' + str(rank), 'w').write(str(os.getpid()))\ntime.sleep(600 if rank else 0)\n"
    with pytest.raises(pytest.fail.Exception, match="on 2 ranks did not end in 1 s") as failure:
        ranks(2, [_script(tmp_path, hangs)], timeout_s=1)
    assert "rank 1 is here" in str(failure.value)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text()), 0)


def test_a_rank_that_fails_is_shown_and_ends_the_others(tmp_path):
    fails = RANK + "time.sleep(600) if rank else sys.exit('rank 0 gives up')\n"
    begun = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"exited with \(1, -9\)") as failure:
        succeed(2, [_script(tmp_path, fails)])
    assert "rank 0 gives up" in str(failure.value) and time.monotonic() - begun < 300


def test_a_run_leaves_nothing_for_the_next(tmp_path):
    leaves = "import os, sys, torch\nprint(torch.initial_seed(), 'LEFT' in os.environ, hasattr(torch, 'left'))\n"
    leaves += "torch.manual_seed(3)\nos.environ['LEFT'] = '1'\ntorch.left = True\nprint(sys.argv[1:])\n"
    first, second = (succeed(1, [_script(tmp_path, leaves), "a", 2]).output for _ in range(2))
    assert first == second and first.endswith("False False\n['a', '2']\n")


def test_a_program_is_no_rank(tmp_path):
    assert program([_script(tmp_path, "import os\nprint('RANK' in os.environ)\n")]).output == "False\n"
