"""How hard each token id is for the teacher: a count and a sum of losses per id, kept beside the cached losses.

The keys of the cache do not hold tokens, so this is gathered while losses are computed. A sample computed by two
replicas at once counts twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regate_megatron.memory.files import read_table, write_table

SUMS_BY_TOKEN = np.dtype([("token", "<i8"), ("count", "<i8"), ("sum", "<f8")])


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

    def write(self, path: Path) -> None:
        """Write the ids seen as one small file; none where there are none."""
        ids, counts, sums = self.seen()
        if len(ids):
            table = np.empty(len(ids), SUMS_BY_TOKEN)
            table["token"], table["count"], table["sum"] = ids, counts, sums
            write_table(path, table)

    def read(self, path: Path) -> None:
        """Add what a file holds. Raises DamagedFile or OSError."""
        table, _ = read_table(path, SUMS_BY_TOKEN)
        self._grow(int(table["token"].max(initial=-1)) + 1)
        self._count[table["token"]] += table["count"]
        self._sum[table["token"]] += table["sum"]

    def seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids that were targets, how often, and their losses added up."""
        ids = np.flatnonzero(self._count)
        return ids, self._count[ids], self._sum[ids]

    def _grow(self, size: int) -> None:
        more = max(0, size - len(self._count))
        self._count = np.concatenate([self._count, np.zeros(more, np.int64)])
        self._sum = np.concatenate([self._sum, np.zeros(more)])
