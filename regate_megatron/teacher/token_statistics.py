"""How hard each token id is for the teacher: a count and a sum of losses per id, kept beside the cached losses.

The keys of the cache do not hold tokens, so this is gathered while losses are computed. A sample computed by two
replicas at once counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from regate_megatron.teacher.cache_files import read_table, write_table


class TokenStatistics:
    """Count and sum of losses by token id."""

    def __init__(self) -> None:
        self._count, self._sum = np.zeros(0, np.int64), np.zeros(0, np.float64)

    def add(self, label_X: np.ndarray, loss_X: np.ndarray) -> None:
        """Take in the losses of targets with these labels (int64, float; X targets)."""
        label_X, loss_X = label_X[label_X >= 0], loss_X[label_X >= 0]
        if not len(label_X):
            return
        self._grow(int(label_X.max()) + 1)
        size = len(self._count)
        self._count += np.bincount(label_X, minlength=size)
        self._sum += np.bincount(label_X, weights=loss_X.astype(np.float64), minlength=size)

    def write(self, folder: Path, stem: str) -> None:
        """Write the ids seen as one small file."""
        ids, counts, sums = self.seen()
        if len(ids):
            arrays = [pa.array(ids), pa.array(counts), pa.array(sums)]
            write_table(folder, stem, pa.record_batch(arrays, names=["id", "count", "sum"]))

    def read(self, paths: Iterable[Path]) -> None:
        """Add what files hold. Raises DamagedFile."""
        for path in paths:
            table = read_table(path)
            ids, counts, sums = (table[name].to_numpy() for name in ("id", "count", "sum"))
            self._grow(int(ids.max()) + 1)
            self._count[ids] += counts
            self._sum[ids] += sums

    def seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids that were targets, how often, and their losses added up."""
        ids = np.flatnonzero(self._count)
        return ids, self._count[ids], self._sum[ids]

    def _grow(self, size: int) -> None:
        more = max(0, size - len(self._count))
        self._count = np.concatenate([self._count, np.zeros(more, np.int64)])
        self._sum = np.concatenate([self._sum, np.zeros(more)])
