"""What difficulty costs on one planner: host memory per target, time per step, growth, eviction, saving and loading.

    python benchmarks/difficulty_store.py                       10^8 targets, 200 per sample, under a minute
    python benchmarks/difficulty_store.py --targets 1000000     a quick look

One process, no Megatron, no exchange between ranks. Memory is what the process holds more than before (VmRSS).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from regate_megatron.memory.difficulty import DifficultyStore
from regate_megatron.memory.files import RECORDS, Piece, RecordFile, write_records
from regate_megatron.memory.records import BYTES_PER_SAMPLE, Records
from regate_megatron.ranks.topology import Topology

ALONE = Topology(0, 1, True, 0, 1, None, None, None)
ROWS, TARGETS_PER_ROW = 32, 1000


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(records: Records, targets: int, per_sample: int) -> float:
    """Add samples of ``per_sample`` targets; returns the longest time for one batch of a million targets, in s."""
    generator, worst = np.random.default_rng(1), 0.0
    batch = max(1, 1_000_000 // per_sample)
    for first in range(0, targets // per_sample, batch):
        count = min(batch, targets // per_sample - first)
        key_N2 = generator.integers(-(2**63), 2**63 - 1, (count, 2))
        value_X = generator.random(count * per_sample, np.float32).astype(np.float16)
        start = time.perf_counter()
        records.append(Piece(key_N2, np.full(count, per_sample), np.full(count, first), value_X))
        worst = max(worst, time.perf_counter() - start)
    return worst


def time_steps(store: DifficultyStore, *, repeat: int) -> tuple[float, float]:
    """Median milliseconds of fetch and of update for 32 rows of 1,000 targets, all of them met before."""
    generator, fetches, updates = torch.Generator().manual_seed(2), [], []
    keys = [torch.randint(-(2**62), 2**62, (ROWS, 2), generator=generator) for _ in range(16)]
    count_N = torch.full((ROWS,), TARGETS_PER_ROW)
    loss_X = torch.rand(ROWS * TARGETS_PER_ROW, generator=generator)
    for step in range(len(keys) + repeat):
        key_N2 = keys[step % len(keys)]
        start = time.perf_counter()
        store.fetch(key_N2, count_N, step)
        middle = time.perf_counter()
        store.update(key_N2, count_N, loss_X, step)
        if step >= len(keys):
            fetches.append(middle - start)
            updates.append(time.perf_counter() - middle)
    return 1000 * statistics.median(fetches), 1000 * statistics.median(updates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100_000_000)
    parser.add_argument("--per-sample", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store, before = DifficultyStore(0.9, ALONE, 1e12), resident()
    start = time.perf_counter()
    worst = fill(store.records, options.targets, options.per_sample)
    seconds, held, records = time.perf_counter() - start, resident() - before, store.records
    print(f"{records.num_targets:,} targets in {len(records):,} samples of {options.per_sample}")
    counted = records.bytes_used / records.num_targets
    print(f"memory: {held / records.num_targets:.3f} bytes per target held, {counted:.3f} counted against the bound")
    print(f"  counted are 2 per target and {BYTES_PER_SAMPLE} per sample; held is more by one block at most")
    print(f"filling: {seconds:.1f} s; longest batch of a million targets {1000 * worst:.0f} ms")
    fetch, update = time_steps(store, repeat=200)
    print(f"a step of {ROWS} rows of {TARGETS_PER_ROW} targets: fetch {fetch:.2f} ms, update {update:.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / f"difficulty-00000{RECORDS}", time.perf_counter()
        snapshot = records.snapshot()
        write_records(path, len(snapshot), snapshot.pieces)
        records.release()
        written, start = time.perf_counter() - start, time.perf_counter()
        file, entry_N = RecordFile.open(path)
        for piece in file.pieces(entry_N, lambda key_N2: key_N2[:, 0] % 2 == 0):
            assert len(piece.value_X) == piece.count_N.sum()
        read, size = time.perf_counter() - start, path.stat().st_size
    print(f"file: {size / records.num_targets:.3f} bytes per target; written {written:.2f} s, read {read:.2f} s")
    records.limit_bytes, start = records.bytes_used - 1, time.perf_counter()
    records.evict()
    print(f"eviction of {records.evicted_samples:,} samples: {time.perf_counter() - start:.2f} s")
    per_target = 2 + BYTES_PER_SAMPLE / 200
    print(f"10^12 targets over 1,024 ranks at 200 per sample: {1e12 / 1024 * per_target / 1e9:.2f} GB per rank")


if __name__ == "__main__":
    main()
