"""Start a script on several gloo ranks, with a hard limit that kills hung ranks; its output is shown when it fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Finished:
    """A run that ended by itself."""

    returncode: int
    output: str
    errors: str


def torchrun(
    num_ranks: int, command: Sequence[str], *, timeout_s: int = 480, env: Mapping[str, str] | None = None
) -> Finished:
    """Run ``command`` (a script, or ``-m module``, and its arguments) on ``num_ranks`` ranks of this machine.

    Fails the test when the run does not end within ``timeout_s``; every rank is killed then.
    """
    for _ in range(3):
        run = _torchrun_once(num_ranks, command, timeout_s, env)
        if "EADDRINUSE" not in run.errors:  # somebody took the port between finding and using it
            break
    return run


def _torchrun_once(num_ranks: int, command: Sequence[str], timeout_s: int, env: Mapping[str, str] | None) -> Finished:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    process = subprocess.Popen(
        [*launcher, "--master-port", str(port), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"{command} on {num_ranks} ranks did not end in {timeout_s} s\n{output[-4000:]}\n{errors[-4000:]}")
    return Finished(process.returncode, output, errors)


def succeed(num_ranks: int, command: Sequence[str], **options) -> Finished:
    """:func:`torchrun` that must exit with 0."""
    run = torchrun(num_ranks, command, **options)
    if run.returncode:
        pytest.fail(
            f"{command} on {num_ranks} ranks exited with {run.returncode}\n{run.output[-3000:]}\n{run.errors[-9000:]}"
        )
    return run
