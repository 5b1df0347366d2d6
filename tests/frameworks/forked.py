"""Ranks forked from a process that has imported what they need: that is paid once, however many runs there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async

SECONDS = 240


def run(name: str, num_ranks: int, log: Path, work: Callable[[], None]) -> bool:
    """Fork ranks that do ``work``; whether all ended well. When one fails the others get ten seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[int] = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            become_rank(rank, num_ranks, port, log, work)
        ranks.append(child)
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < num_ranks and time.monotonic() < end:
        for child in set(ranks) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = status
                end = min(end, time.monotonic() + 10) if status else end
        time.sleep(0.02)
    for child in ranks:  # with what they have forked, which may outlive them
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if child not in codes:
            codes[child] = os.waitpid(child, 0)[1]
    if any(codes.values()):
        text = "\n".join(Path(f"{log}.{rank}").read_text()[-4000:] for rank in range(num_ranks))
        print(f"{name} failed: {codes}\n{text}", file=sys.stderr, flush=True)
    return not any(codes.values())


def become_rank(rank: int, num_ranks: int, port: int, log: Path, work: Callable[[], None]) -> None:
    """In a forked child: be one rank, and end."""
    os.setsid()
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    # Megatron would spawn this process, which would import all of Bridge again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
