"""Where each record of the cache lies: sorted arrays of 16 bytes per record, no Python object per record.

A record is found by the first half of its key; what it is found by is compared with the whole key when it is read.
New files come in as segments of their own; a segment is merged into its neighbour once it has half of its size, so
there are few of them however many files there are.
"""

from __future__ import annotations

import numpy as np


class KeyIndex:
    """Places (file, row) by the first half of a key. One thread adds, any may look up."""

    def __init__(self) -> None:
        self._segments: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def __len__(self) -> int:
        return sum(len(first_N) for first_N, _ in self._segments)

    def add(self, first_N: np.ndarray, file: int) -> None:
        """Enter the records of one file: first halves of their keys, int64 [N], by row."""
        order = np.argsort(first_N, kind="stable")
        segments = [*self._segments, (first_N[order], (np.int64(file) << 32) | order.astype(np.int64))]
        while len(segments) > 1 and 2 * len(segments[-1][0]) >= len(segments[-2][0]):
            segments[-2:] = [_merge(*segments[-2:])]
        self._segments = tuple(segments)  # replaced whole: a look-up in progress keeps what it has

    def find(self, first_N: np.ndarray) -> list[list[tuple[int, int]]]:
        """The places of every key with each first half: (file, row), the longest known first."""
        places: list[list[tuple[int, int]]] = [[] for _ in first_N]
        for known, place in self._segments:
            start_N, stop_N = np.searchsorted(known, first_N, "left"), np.searchsorted(known, first_N, "right")
            for index in np.flatnonzero(start_N < stop_N):
                found = place[start_N[index] : stop_N[index]].tolist()
                places[index] += [(one >> 32, one & 0xFFFFFFFF) for one in found]
        return places


def _merge(old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    first = np.concatenate([old[0], new[0]])
    order = np.argsort(first, kind="stable")  # two sorted runs: one merge
    return first[order], np.concatenate([old[1], new[1]])[order]
