"""Many small runs for the price of one start: imports Megatron once, then forks the ranks of every run asked for.

Reads one JSON object per line from standard input:

- "ranks", "env", "timeout_s"; "log": rank r writes LOG.r;
- "argv" of ``python -m regate_megatron --cpu``, or of the script itself when "plain";
- "kill": none, or [path, seconds]: so long after the path appears all ranks are killed, with what they have forked.

Answers each with one line: {"codes": [exit code per rank, negative for signals]}.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import megatron.core.tokenizers.text.libraries
import megatron.training  # noqa: F401
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401

from regate_megatron.__main__ import main as launch
from regate_megatron.cpu.emulation import forked
from regate_megatron.integrations import megatron_checkpoints, megatron_lm  # noqa: F401


def work(job: dict) -> None:
    """What every rank of a run does."""
    script, *flags = job["argv"]
    if not job.get("plain"):
        return launch(["--cpu", script, *flags])
    sys.argv = [script, *emulation.adjust_arguments(flags)]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    emulation.leave()


def after(path: str, seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have gone by since the path appeared."""
    seen: list[float] = []

    def has_passed() -> bool:
        if not seen and Path(path).exists():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + seconds

    return has_passed


def run(job: dict) -> list[int]:
    """Run one job; the exit codes."""
    stop = after(*job["kill"]) if job.get("kill") else None
    how = {"log": job["log"], "timeout_s": job.get("timeout_s", 480), "env": job.get("env"), "stop": stop}
    return forked.run(job["ranks"], lambda: work(job), **how).codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps({"codes": run(json.loads(line))}), flush=True)
