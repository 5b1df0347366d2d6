"""Run a command with a progress bar read from its log lines; its whole output goes to a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
ITERATION = re.compile(r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
LOSS = re.compile(r"lm loss: ([\dE.+-]+)")
TAIL = 30


RUNNING: set[subprocess.Popen] = set()


class CommandError(RuntimeError):
    """A command ended with an error; the message holds the end of its log."""


def torchrun(num_processes: int, *arguments: str) -> list[str]:
    """A command line of torchrun on this machine, at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", str(num_processes)]
    return [sys.executable, "-m", "torch.distributed.run", *where, *arguments]


def run_command(
    command: list[str], log: Path, *, title: str, iterations: int = 0, variables: Mapping[str, str] | None = None
) -> float:
    """Run `command`; returns the seconds Megatron counted for its training steps.

    Args:
        log: file for all it prints.
        iterations: training steps to expect in it, 0 for a program that has none.
        variables: of its environment, beside one thread per process.

    Raises:
        CommandError: it failed.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment() | dict(variables or {}),
        start_new_session=True,  # a group of its own, so that all of it can be ended
    )
    RUNNING.add(process)
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        with log.open("w") as file:
            print("$ " + " ".join(command), file=file, flush=True)
            seconds = follow(process.stdout, file, tail, title, iterations)
        code = process.wait()
    finally:
        if process.poll() is None:  # interrupted
            stop(process)
            process.wait()
        RUNNING.discard(process)
    if code:
        raise CommandError(
            f"{title} failed with exit code {code}; the end of {os.path.relpath(log)}:\n" + "".join(tail).rstrip()
        )
    return seconds


def stop_all() -> None:
    """End every command that other threads still wait for."""
    for process in list(RUNNING):
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a command and what it has started; torchrun ends its workers, which have sessions of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def follow(lines: TextIO, file: TextIO, tail: deque[str], title: str, iterations: int) -> float:
    """Copy `lines` to `file`, keep the last in `tail`, move the bar; returns the seconds of training steps."""
    is_over, seconds, form = False, 0.0, "{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    pace = 0.5 if sys.stdout.isatty() else 10  # seconds; a file gets a line for every move
    with tqdm(desc=f"{title:14}", total=iterations or 1, bar_format=form, mininterval=pace, file=sys.stdout) as bar:
        bar.set_postfix_str("starting" if iterations else "")
        for line in lines:
            file.write(line)
            file.flush()
            is_over = is_over or "torch/distributed/elastic" in line or "torch.distributed.elastic" in line
            if not is_over:  # what follows is torchrun's own account of the failure, without the cause
                tail.append(line)
            if found := ITERATION.search(line):
                done = int(found[1])
                seconds += (done - bar.n) * float(found[2]) / 1000
                if loss := LOSS.search(line):
                    bar.set_postfix_str(f"loss {float(loss[1]):.3f}", refresh=False)
                bar.update(done - bar.n)
            elif line.startswith("held-out: "):
                bar.write(f"{title:14} {describe(json.loads(line.partition(' ')[2]))}", file=sys.stdout)
        if not iterations:
            bar.update()
    return seconds


def describe(evaluation: dict) -> str:
    """One line of train.py's evaluation for a person."""
    return (
        f"held out after {evaluation['iteration']:3} iterations: loss {evaluation['eval_loss']:.3f}; words that need "
        f"the picture {evaluation['image_word_accuracy']:.1%} right, all words {evaluation['all_word_accuracy']:.1%}"
    )


def environment() -> dict[str, str]:
    """One thread per process, as there are more processes than cores; the package from this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
