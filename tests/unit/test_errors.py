"""A refusal in a script that has no launcher round it is one line, also where torch has hooked uncaught exceptions."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch.distributed as dist
from regate_megatron.errors import one_line_refusals_from_now_on, refuse
one_line_refusals_from_now_on()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torch puts its own hook round ours
raise refuse("model", given="a", allowed="b", change="c")
"""


def test_a_refusal_after_the_process_group_is_one_line():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "regate: model: given a; allowed b; change c\n" and not run.stdout
