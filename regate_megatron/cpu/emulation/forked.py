"""Ranks forked from one process that has imported torch and Megatron: they start at once and share its memory.

    ended = run(4, lambda: main(["--cpu", script, *flags]), log=folder / "log", timeout_s=600)

Each rank finds the variables torchrun would set, writes to a log of its own and is the head of its own process group:
whatever it has forked ends with it. The caller must not have started threads.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SECONDS_FOR_THE_OTHERS = 10  # after a rank has failed, the others may say why
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How the ranks ended.

    Attributes:
        codes: exit code per rank; negative: the signal that killed it.
        first: exit code of the rank that failed first; 0 where none did.
        timed_out: whether the time limit ended them.
    """

    codes: list[int]
    first: int = 0
    timed_out: bool = False


def run(
    num_ranks: int,
    work: Callable[[], None],
    *,
    log: Path | str,
    timeout_s: float,
    env: Mapping[str, object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Ended:
    """Run ``work`` on forked ranks and wait for them; when one fails, the others are killed soon after.

    Args:
        log: rank r writes ``<log>.r``, both streams.
        timeout_s: seconds after which all ranks are killed.
        env: variables to set in every rank beside torchrun's.
        stop: asked again and again; all ranks are killed once it is true.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    ranks: list[int] = []
    codes: dict[int, int] = {}
    before = signal.signal(signal.SIGTERM, _leave)  # so that the ranks are ended, too
    first, limit = 0, time.monotonic() + timeout_s
    end = limit
    try:
        for rank in range(num_ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
            child = os.fork()
            if child == 0:
                _become(place, work, f"{log}.{rank}")
            ranks.append(child)
        while len(codes) < num_ranks:
            for child in ranks:
                done, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    first = first or codes[child]
                    if status:
                        end = min(end, time.monotonic() + _SECONDS_FOR_THE_OTHERS)
            if time.monotonic() > end or (stop is not None and stop()):
                _kill(ranks)
            time.sleep(0.001 if stop else 0.02)
    finally:
        signal.signal(signal.SIGTERM, before)
        _kill(ranks)  # what a rank has forked may outlive it: Megatron's queue of written checkpoint files does
    return Ended([codes[child] for child in ranks], first, time.monotonic() > limit)


def _become(place: Mapping[str, object], work: Callable[[], None], log: str) -> None:
    """In a forked child: be one rank, and end."""
    os.setsid()
    gc.freeze()  # what was imported before is no garbage: no collection looks at it, and its memory stays shared
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives who started it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {name: str(value) for name, value in place.items()}
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and end.code != 1:
            print(end.code, file=sys.stderr)  # sys.exit("why")
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as an interpreter of its own would end: a patched script has its own hook
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _kill(ranks: list[int]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)
