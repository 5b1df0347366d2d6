"""Many small runs for the price of one start: imports Megatron once, then forks the ranks of every run asked for.

Reads one JSON object per line from standard input:

- "ranks", "env", "timeout_s"; "log": rank r writes LOG.r, and what goes to standard error to LOG.r.errors;
- "command" of an interpreter: a script or ``-m module``, and its arguments; with "alone" it is no rank;
- or "argv" of ``python -m regate_megatron --cpu``, or of the script itself when "plain";
- "kill": none, or [path, seconds]: so long after the path appears all ranks are killed, with what they have forked.

Answers each with one line: {"codes": [exit code per rank, negative for signals], "timed_out": the limit ended it}.
"""

from __future__ import annotations

import gc

gc.disable()  # until all is imported: a fifth of the time it takes

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import megatron.core.tokenizers.text.libraries  # noqa: F401  transformers, which reads 3,000 files of its own
import torch
from megatron.core.datasets import blended_megatron_dataset_builder, gpt_dataset  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401
from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401
from megatron.core.models.multimodal import llava_model  # noqa: F401
from megatron.training import arguments, training  # noqa: F401

from regate_megatron.__main__ import main as launch
from regate_megatron.cpu.emulation import forked
from regate_megatron.integrations import megatron_checkpoints, megatron_lm  # noqa: F401

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def work(job: dict) -> None:
    """What every rank of a run does."""
    errors = f"{job['log']}.{os.environ['RANK']}.errors"
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    if job.get("alone"):
        for name in OF_A_RANK:
            del os.environ[name]
    if "command" in job:
        return interpret(*job["command"])
    script, *flags = job["argv"]
    if not job.get("plain"):
        return launch(["--cpu", script, *flags])
    interpret(script, *emulation.adjust_arguments(flags))
    emulation.leave()


def interpret(script: str, *words: str) -> None:
    """Do what ``python SCRIPT WORDS`` or ``python -m MODULE WORDS`` does."""
    if script == "-m":
        module, *words = words
        sys.modules.pop(f"{module}.__main__", None)  # ours has been imported; it is to run as a program
        sys.argv = ["-m", *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *words]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")


def after(path: str, seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have gone by since the path appeared."""
    seen: list[float] = []

    def has_passed() -> bool:
        if not seen and Path(path).exists():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + seconds

    return has_passed


def run(job: dict) -> forked.Ended:
    """Run one job."""
    stop = after(*job["kill"]) if job.get("kill") else None
    how = {"log": job["log"], "timeout_s": job.get("timeout_s", 480), "env": job.get("env"), "stop": stop}
    return forked.run(job["ranks"], lambda: work(job), **how)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))  # the emulation keeps what it reads
    gc.enable()
    for line in sys.stdin:
        ended = run(json.loads(line))
        print(json.dumps({"codes": ended.codes, "timed_out": ended.timed_out}), flush=True)
