"""Small Megatron runs, one after another, from one process that has imported everything (multiprocess/run_many.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT


@dataclass(frozen=True)
class Ran:
    """A run that ended: exit codes, and all that its ranks said."""

    codes: list[int]
    output: str


class Many:
    """Starts runs; made by :func:`many`."""

    def __init__(self, server: subprocess.Popen, folder: Path, timeout_s: int) -> None:
        self._server, self._folder, self._count, self._timeout_s = server, folder, 0, timeout_s

    def run(self, num_ranks: int, argv: list[str], *, ok: bool | None = True, **job) -> Ran:
        """Run ``argv`` on ``num_ranks`` ranks; must succeed (``ok``), fail (False), or may do either (None)."""
        self._count += 1
        log = self._folder / f"run{self._count:03d}"
        job = {"timeout_s": self._timeout_s, **job}
        job |= {"ranks": num_ranks, "argv": [str(word) for word in argv], "log": str(log)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process that starts runs has died"
        codes = json.loads(answer)["codes"]
        output = "\n".join(Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(num_ranks))
        if ok is not None and any(codes) == ok:
            pytest.fail(f"{argv} on {num_ranks} ranks ended with {codes}\n{output[-9000:]}")
        return Ran(codes, output)


@contextmanager
def many(folder: Path, *paths: Path, timeout_s: int = 240) -> Iterator[Many]:
    """A server for the time of the block; logs of its runs in ``folder``; it imports from ``paths`` before a wheel."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/multiprocess/run_many.py")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Many(server, folder, timeout_s)
    finally:
        server.stdin.close()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
