"""Ranks forked from a process that has imported Megatron-Bridge, as the emulation forks them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async

from regate_megatron.cpu.emulation import forked

SECONDS = 240


def run(name: str, num_ranks: int, log: Path, work: Callable[[], None]) -> bool:
    """Fork ranks that do ``work``; whether all ended well."""

    def on_rank() -> None:
        # Megatron would spawn this process, which would import all of Bridge again.
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
        work()

    codes = forked.run(num_ranks, on_rank, log=log, timeout_s=SECONDS).codes
    if any(codes):
        text = "\n".join(Path(f"{log}.{rank}").read_text(errors="replace")[-4000:] for rank in range(num_ranks))
        print(f"{name} failed: {codes}\n{text}", file=sys.stderr, flush=True)
    return not any(codes)
