"""A study, nothing users can switch on: rows dealt to data-parallel ranks by their short lengths.

The largest differencing method of Karmarkar and Karp with an equal number of rows per rank (Michiels et al., balanced
LDM; verl balances its sequences alike): rows are sorted and cut into groups of one row per rank; the two groups of the
largest spread are merged, largest to smallest, until one is left.
"""

from __future__ import annotations

import heapq

import numpy as np


def assign(length_N: np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank of each row, int64 [N]; every rank gets N / ``num_ranks`` rows and nearly the same sum of lengths.

    Raises:
        ValueError: N is no multiple of ``num_ranks``.
    """
    if len(length_N) % num_ranks:
        raise ValueError(f"{len(length_N)} rows for {num_ranks} ranks")
    order_NR = np.argsort(-length_N, kind="stable").reshape(-1, num_ranks)
    groups = [(length_N[rows_R], rows_R[:, None]) for rows_R in order_NR]  # sums, falling, and the rows behind them
    heap = [(-int(np.ptp(sum_R)), index, sum_R, rows) for index, (sum_R, rows) in enumerate(groups)]
    heapq.heapify(heap)
    for index in range(len(heap), 2 * len(heap) - 1):
        _, _, sum_R, rows = heapq.heappop(heap)
        _, _, other_R, other = heapq.heappop(heap)
        sum_R, rows = sum_R + other_R[::-1], np.concatenate([rows, other[::-1]], axis=1)
        falling = np.argsort(-sum_R, kind="stable")
        heapq.heappush(heap, (-int(np.ptp(sum_R)), index, sum_R[falling], rows[falling]))
    rank_N = np.empty(len(length_N), dtype=np.int64)
    rank_N[heap[0][3]] = np.arange(num_ranks)[:, None]
    return rank_N
