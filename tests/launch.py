"""Start programs on gloo ranks, with a hard limit that kills hung ranks; their output is shown when they fail.

``ranks`` and ``succeed`` fork them from one warm process per pytest process, which has imported torch and Megatron:
a rank of its own interpreter spends five seconds on that, a forked one none. ``program`` forks a single process that
is no rank. ``torchrun`` is the real launcher, for what is about it or about an interpreter of one's own.
"""

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
    """A run that ended by itself.

    Attributes:
        returncode: 0 where all ranks succeeded.
        output: standard output of all ranks.
        errors: standard error of all ranks.
        codes: exit code per rank, negative for the signal that killed it; torchrun does not say them.
    """

    returncode: int
    output: str
    errors: str
    codes: tuple[int, ...] = ()


def ranks(
    num_ranks: int, command: Sequence[object], *, timeout_s: int = 480, env: Mapping[str, str] | None = None, **job
) -> Finished:
    """Run ``command`` (a script, or ``-m module``, and its arguments) on ``num_ranks`` ranks of this machine.

    Fails the test when the run does not end within ``timeout_s``; every rank is killed then. ``job``: more of what
    multiprocess/run_many.py understands.
    """
    from tests.many import shared

    for _ in range(3):
        codes, output, errors = shared().start(
            num_ranks, command=[str(word) for word in command], timeout_s=timeout_s, env=dict(env or {}), **job
        )
        if "EADDRINUSE" not in errors:  # somebody took the port between finding and using it
            break
    return Finished(next((code for code in codes if code), 0), output, errors, tuple(codes))


def program(command: Sequence[object], **options) -> Finished:
    """Run ``command`` in one process that no launcher started."""
    return ranks(1, command, alone=True, **options)


def succeed(num_ranks: int, command: Sequence[object], *, how=ranks, **options) -> Finished:
    """:func:`ranks` (or ``how``) that must exit with 0."""
    run = how(num_ranks, command, **options)
    if run.returncode:
        pytest.fail(
            f"{command} on {num_ranks} ranks exited with {run.codes or run.returncode}\n"
            f"{run.output[-3000:]}\n{run.errors[-9000:]}"
        )
    return run


def torchrun(
    num_ranks: int, command: Sequence[object], *, timeout_s: int = 480, env: Mapping[str, str] | None = None
) -> Finished:
    """:func:`ranks` as a user starts them: by torchrun, each an interpreter of its own."""
    for _ in range(3):
        run = _torchrun_once(num_ranks, command, timeout_s, env)
        if "EADDRINUSE" not in run.errors:
            break
    return run


def _torchrun_once(
    num_ranks: int, command: Sequence[object], timeout_s: int, env: Mapping[str, str] | None
) -> Finished:
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
        process.terminate()  # ranks have sessions of their own: only the launcher knows them, and ends them when told
        try:
            output, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
        pytest.fail(f"{command} on {num_ranks} ranks did not end in {timeout_s} s\n{output[-4000:]}\n{errors[-4000:]}")
    return Finished(process.returncode, output, errors)
