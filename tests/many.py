"""Runs from a warm process, which has imported torch and Megatron once and forks the ranks (multiprocess/run_many.py).

One is shared by all tests of a pytest process; what needs another Megatron on its path has one of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT

_SECONDS_TO_START = 120
_SECONDS_TO_ANSWER = 60  # beyond a run's own limit, at which the warm process kills all ranks


@dataclass(frozen=True)
class Ran:
    """A run that ended: exit codes, and all that its ranks said."""

    codes: list[int]
    output: str


class Many:
    """A warm process and the folder its runs log to; ``paths`` come before the installed packages."""

    def __init__(self, folder: Path, *paths: Path, timeout_s: int = 240) -> None:
        self._folder, self._count, self._timeout_s = folder, 0, timeout_s
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/multiprocess/run_many.py")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def start(self, num_ranks: int, **job) -> tuple[list[int], str, str]:
        """Exit codes, standard output and standard error of one job; fails the test where it did not end in time."""
        self._count += 1
        log = self._folder / f"run{self._count:03d}"
        job = {"timeout_s": self._timeout_s, **job, "ranks": num_ranks, "log": str(log)}
        self._server.stdin.write(json.dumps(job) + "\n")
        ready, _, _ = select.select(
            [self._server.stdout], [], [], _SECONDS_TO_START + job["timeout_s"] + _SECONDS_TO_ANSWER
        )
        answer = self._server.stdout.readline() if ready else ""
        if not answer:
            self.close()
        assert answer, "the process that starts runs has died or hangs"
        output, errors = (
            "\n".join(_read(Path(f"{log}.{rank}{kind}")) for rank in range(num_ranks)) for kind in ("", ".errors")
        )
        answer = json.loads(answer)
        if answer["timed_out"]:
            what = job.get("command") or job.get("argv")
            pytest.fail(
                f"{what} on {num_ranks} ranks did not end in {job['timeout_s']} s\n{output[-4000:]}\n{errors[-4000:]}"
            )
        return answer["codes"], output, errors

    def run(self, num_ranks: int, argv: list[object], *, ok: bool | None = True, **job) -> Ran:
        """Run ``argv`` on ``num_ranks`` ranks; must succeed (``ok``), fail (False), or may do either (None)."""
        codes, output, errors = self.start(num_ranks, argv=[str(word) for word in argv], **job)
        if ok is not None and any(codes) == ok:
            pytest.fail(f"{argv} on {num_ranks} ranks ended with {codes}\n{output[-5000:]}\n{errors[-9000:]}")
        return Ran(codes, f"{output}\n{errors}")

    def close(self) -> None:
        """End the process and whatever it runs."""
        with suppress(OSError):
            self._server.stdin.close()
        try:
            self._server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)  # its ranks die with it
            self._server.wait()


def _read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


@functools.cache
def shared() -> Many:
    """The warm process of this pytest process, with the installed packages."""
    folder = Path(tempfile.mkdtemp(prefix="regate-tests-"))
    server = Many(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.close)
    return server


@contextmanager
def many(folder: Path, *paths: Path, timeout_s: int = 240) -> Iterator[Many]:
    """The shared process, or where ``paths`` come before the installed packages one for the time of the block."""
    if not paths:
        yield shared()
        return
    server = Many(folder, *paths, timeout_s=timeout_s)
    try:
        yield server
    finally:
        server.close()
