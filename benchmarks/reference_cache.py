#!/usr/bin/env python3
"""Time look-ups in a reference-loss cache on this machine's disk.

    python benchmarks/reference_cache.py [--records 1000000]

Prints bytes per target, the time to open the cache, and the time to look up 32 samples of 200 targets at random places.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from regate_megatron.memory.files import RECORDS
from regate_megatron.memory.references import LOSS_FOLDER, ReferenceCache, write_losses

TARGETS, ROWS, ROUNDS, RECORDS_PER_FILE = 200, 32, 300, 100_000


def main() -> None:
    """Make a cache in a temporary folder, time it, delete it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    count = parser.parse_args().records
    generator = np.random.default_rng(0)
    key_N2 = generator.integers(-(2**63), 2**63 - 1, (count, 2))
    with tempfile.TemporaryDirectory() as folder:
        losses = Path(folder, LOSS_FOLDER)
        losses.mkdir()
        for start in range(0, count, RECORDS_PER_FILE):
            keys = [key.tobytes() for key in key_N2[start : start + RECORDS_PER_FILE]]
            values = generator.random((len(keys), TARGETS)).astype(np.float16)
            write_losses(losses / f"w-{start}{RECORDS}", dict(zip(keys, values, strict=True)))
        size = sum(path.stat().st_size for path in losses.iterdir())
        before = time.perf_counter()
        cache = ReferenceCache(folder, "reader")
        opened = time.perf_counter() - before
        times = []
        for _ in range(ROUNDS):
            keys = [key_N2[row].tobytes() for row in generator.integers(0, count, ROWS)]
            before = time.perf_counter()
            found = cache.look_up(keys, [TARGETS] * ROWS)
            times.append(1000 * (time.perf_counter() - before))
            assert all(loss is not None for loss in found)
        cache.close()
    print(
        f"{count:,} records of {TARGETS} targets: {size / count / TARGETS:.2f} bytes per target, open in {opened:.2f} s"
    )
    print(
        f"{ROWS} samples: median {np.median(times):.2f} ms, 90 % {np.quantile(times, 0.9):.2f}, most {max(times):.2f}"
    )


if __name__ == "__main__":
    main()
