"""``dealt``: rows of the global batch go to the rank and microbatch that their short lengths ask for. Pure numpy.

Every row runs at its own length; what is decided here is where. All planners know all lengths and compute the same.

**Columns.** Rows, falling by length, are cut into groups of b (the rows of a microbatch) and these into *columns* of D
adjacent groups, one for each rank: microbatch i of all ranks comes from one column. So ranks that wait for each other
in every microbatch (experts, pipelines) run near-equal lengths in each. *No deal waits less:* the longest group of the
k-th longest microbatch has at least ``(k-1)·D`` others that are as long or longer, and in sorted columns exactly those.

**Within columns** each rank gets one group of every column, so that totals are as equal as may be, by two methods; the
one whose slowest rank is faster is taken, the first where they are alike.

- *turns* (:func:`by_turns`): columns one after the other, the most uneven first; the longest group goes to the rank
  that has least so far.
- *differencing* (:func:`by_differencing`): the largest differencing method of Karmarkar and Karp with as many rows for
  each (Michiels et al., balanced LDM; verl balances its sequences alike). The two columns of the largest spread are
  merged, longest to shortest, until one is left.

**Across columns.** Where no rank waits for another before the step ends, totals count alone: then the slowest rank
swaps a row with the fastest, the pair that brings them closest, until that gains nothing (:func:`by_swaps`). An outlier
in the first column has no match in the others, whose rows are all but alike.

**Staying home.** Rows of one length (and one form) stand for each other, so what is dealt are lengths: bundles of them,
one for each rank. Ranks choose bundles by how many lengths they hold of each, the largest number first; a row whose
length its rank keeps stays. Where rows at home run as well as dealt ones, none moves.

**Order.** The shortest microbatches come first and last, the longest in the middle: a pipeline idles while the first
one goes down and the last one comes up.

Ties go to the lower content key, then to the lower rank at home.

Shapes: D ranks, R rows of each, M microbatches of b = R/M rows, N = D·R rows.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

_EVEN = 1.001  # max/mean that no swap is looked for any more
_FEW = 512  # different numbers
_AT_ONCE = 8192  # rows whose pairs are in memory at a time


@dataclass(frozen=True)
class Deal:
    """Who runs which row.

    Attributes:
        from_DR: the row that each place gets, as rank · R + number at home; every row once; int64.
        method: "home", "turns" or "differencing".
        total_D: positions of each rank, int64.
        longest_M: of each microbatch the longest length on any rank, int64.
    """

    from_DR: np.ndarray
    method: str
    total_D: np.ndarray
    longest_M: np.ndarray

    @property
    def num_moved(self) -> int:
        """Rows that leave their rank."""
        home_D1 = np.arange(len(self.from_DR))[:, None]
        return int((self.from_DR // self.from_DR.shape[1] != home_D1).sum())


def deal(
    length_DR: np.ndarray,
    key_DR: np.ndarray,
    *,
    rows: int = 1,
    form_DR: np.ndarray | None = None,
    in_columns: bool = True,
) -> Deal:
    """Deal the rows of a global batch; the same on every rank that knows the same.

    Args:
        length_DR: positions that each row runs, by the rank and the place it has now; int64.
        key_DR: content keys, int64.
        rows: b; ``rows`` adjacent places are a microbatch, whose rows share one length, the longest.
        form_DR: rows of one form alone may share a microbatch, int64; there is a multiple of b of each. None: all may.
        in_columns: whether ranks wait for each other in every microbatch, so that rows at home must be as even in each.

    Raises:
        ValueError: a form's rows do not fill microbatches.
    """
    num_ranks, num_rows = length_DR.shape
    num_micro = num_rows // rows
    form_DR = np.zeros_like(length_DR) if form_DR is None else form_DR
    length_N, key_N, form_N = length_DR.ravel(), key_DR.ravel(), form_DR.ravel()
    if (np.unique(form_N, return_counts=True)[1] % rows).any():
        raise ValueError(f"rows of one form that are no multiple of the {rows} rows of a microbatch")
    if not np.ptp(length_DR):  # nothing to deal, nor another order to run them in
        from_DR = np.arange(length_DR.size).reshape(length_DR.shape)
        return Deal(from_DR, "home", length_DR.sum(axis=1), length_DR[0, ::rows])
    order_N = np.lexsort((key_N, -length_N, form_N))
    is_next_N = (np.diff(form_N[order_N], prepend=form_N[order_N[0]]) != 0) | (
        np.diff(length_N[order_N], prepend=length_N[order_N[0]]) != 0
    )
    kind_N = np.empty_like(order_N)  # rows of one kind stand for each other
    kind_N[order_N] = is_next_N.cumsum()
    group_Gb = order_N.reshape(-1, rows)
    column_MD = np.argsort(-length_N[group_Gb[:, 0]], kind="stable").reshape(num_micro, num_ranks)
    length_MD = length_N[group_Gb[column_MD, 0]]
    method, place_MD = _better(length_MD)
    bundle_MD = np.take_along_axis(column_MD, place_MD, axis=1)
    length_MD = np.take_along_axis(length_MD, place_MD, axis=1)
    if not in_columns:
        swapped_MD = by_swaps(length_MD)
        bundle_MD, length_MD = (values_MD.ravel()[swapped_MD] for values_MD in (bundle_MD, length_MD))
    total_D, longest_M = length_MD.sum(axis=0) * rows, length_MD.max(axis=1)
    home = _at_home(length_DR, rows)
    waits_less = not in_columns or home.longest_M.sum() <= longest_M.sum()
    if home.total_D.max() <= total_D.max() and waits_less:
        return home
    middle_M = _longest_in_the_middle(num_micro)
    bundle_DM = bundle_MD[middle_M].T
    kind_DR = kind_N[group_Gb[bundle_DM]].reshape(num_ranks, num_rows)
    chosen_D = _choose(kind_N.reshape(num_ranks, num_rows), kind_DR)
    from_DR = _fill(kind_DR[chosen_D], kind_N.reshape(num_ranks, num_rows), key_N)
    return Deal(from_DR, method, total_D[chosen_D], longest_M[middle_M])


def at_best(length_DM: np.ndarray) -> tuple[int, int]:
    """What no deal of these microbatches, as many to each rank, falls below.

    Of any ``k·D + 1`` microbatches some rank has k + 1, for every k; take the longest ones, and the shortest of all for
    the rest of that rank's. Totals are multiples of what all lengths are multiples of.

    Args:
        length_DM: positions of each microbatch, int64.

    Returns:
        the least total of the slowest rank; and the least sum over microbatches of the longest that any rank runs in
        each, which sorted columns have (see the module's text).
    """
    num_ranks, num_micro = length_DM.shape
    falling_N = np.sort(length_DM, axis=None)[::-1]
    step = int(np.gcd.reduce(falling_N)) or 1
    least = -(-int(falling_N.sum()) // (num_ranks * step)) * step
    for k in range(num_micro):
        last = k * num_ranks
        rest = num_micro - k - 1
        least = max(least, int(falling_N[last - k : last + 1].sum() + falling_N[len(falling_N) - rest :].sum()))
    return least, int(falling_N[::num_ranks].sum())


def by_turns(length_MD: np.ndarray) -> np.ndarray:
    """Of each column the place that each bundle gets; int64 [M, D]. Columns fall by length."""
    place_MD = np.empty(length_MD.shape, np.int64)
    total_D = np.zeros(length_MD.shape[1], np.int64)
    for column in np.argsort(-np.ptp(length_MD, axis=1), kind="stable"):
        least_D = np.argsort(total_D, kind="stable")
        place_MD[column, least_D] = np.arange(len(total_D))
        total_D[least_D] += length_MD[column]
    return place_MD


def by_differencing(length_MD: np.ndarray) -> np.ndarray:
    """As :func:`by_turns`, by the largest differencing method."""
    num_micro, num_ranks = length_MD.shape
    # sums of partial bundles, falling, and per bundle the columns in it with the place in each
    heap = [(-int(np.ptp(sum_D)), index, sum_D, {index: np.arange(num_ranks)}) for index, sum_D in enumerate(length_MD)]
    heapq.heapify(heap)
    for index in range(num_micro, 2 * num_micro - 1):
        _, _, sum_D, places = heapq.heappop(heap)
        _, _, other_D, others = heapq.heappop(heap)
        sum_D = sum_D + other_D[::-1]
        falling_D = np.argsort(-sum_D, kind="stable")
        merged = {column: place_D[falling_D] for column, place_D in places.items()}
        merged |= {column: place_D[::-1][falling_D] for column, place_D in others.items()}
        heapq.heappush(heap, (-int(np.ptp(sum_D)), index, sum_D[falling_D], merged))
    return np.stack([heap[0][3][column] for column in range(num_micro)])


def by_swaps(length_MD: np.ndarray) -> np.ndarray:
    """Swaps across columns: where in [M, D] each row of the new bundles was, falling by length; int64 [M, D]."""
    num_ranks = length_MD.shape[1]
    length_DM, from_DM = length_MD.T.copy(), np.arange(length_MD.size).reshape(length_MD.shape).T.copy()
    total_D = length_DM.sum(axis=1)
    enough = _EVEN * total_D.sum() / num_ranks
    for _ in range(num_ranks):
        slow, fast = int(total_D.argmax()), int(total_D.argmin())
        too_much = int(total_D[slow] - total_D[fast])
        less_MM = length_DM[slow][:, None] - length_DM[fast]
        own, other = divmod(int(np.abs(2 * less_MM - too_much).argmin()), len(length_MD))
        less = int(less_MM[own, other])
        if total_D[slow] <= enough or not 0 < less < too_much:
            break
        for one_DM in (length_DM, from_DM):
            one_DM[slow, own], one_DM[fast, other] = one_DM[fast, other], one_DM[slow, own]
        total_D[[slow, fast]] += [-less, less]
    falling_DM = np.argsort(-length_DM, axis=1, kind="stable")
    return np.take_along_axis(from_DM, falling_DM, axis=1).T


def _better(length_MD: np.ndarray) -> tuple[str, np.ndarray]:
    found = {"turns": by_turns(length_MD), "differencing": by_differencing(length_MD)}
    return min(found.items(), key=lambda one: np.take_along_axis(length_MD, one[1], axis=1).sum(axis=0).max())


def _longest_in_the_middle(num_micro: int) -> np.ndarray:
    """Columns, which fall by length, in the order of microbatches; int64 [M]."""
    number_M = np.arange(num_micro)
    return np.concatenate([number_M[::2][::-1], number_M[1::2]])


def _at_home(length_DR: np.ndarray, rows: int) -> Deal:
    """No row leaves its rank; whole microbatches change their order there."""
    num_ranks, num_rows = length_DR.shape
    length_DM = length_DR.reshape(num_ranks, -1, rows).max(axis=2)
    falling_DM = np.argsort(-length_DM, axis=1, kind="stable")[:, _longest_in_the_middle(num_rows // rows)]
    from_DMb = (np.arange(num_ranks)[:, None] * num_rows + falling_DM * rows)[..., None] + np.arange(rows)
    return Deal(
        from_DMb.reshape(num_ranks, num_rows),
        "home",
        length_DM.sum(axis=1) * rows,
        np.take_along_axis(length_DM, falling_DM, axis=1).max(axis=0),
    )


def _numbered(kind_DR: np.ndarray) -> np.ndarray:
    """The same kinds as numbers that are told apart within a rank: its first of a kind, its second …; int64 [D, R]."""
    order_DR = np.argsort(kind_DR, axis=1, kind="stable")
    sorted_DR = np.take_along_axis(kind_DR, order_DR, axis=1)
    place_R = np.arange(kind_DR.shape[1])
    is_first_DR = np.diff(sorted_DR, axis=1, prepend=-1) != 0
    start_DR = np.maximum.accumulate(np.where(is_first_DR, place_R, 0), axis=1)
    numbered_DR = np.empty_like(kind_DR)
    np.put_along_axis(numbered_DR, order_DR, sorted_DR * len(place_R) + place_R - start_DR, axis=1)
    return numbered_DR


def _choose(home_DR: np.ndarray, kind_DR: np.ndarray) -> np.ndarray:
    """The bundle of each rank, that keeps most of its rows at home, the largest numbers first; int64 [D]."""
    num_ranks = len(kind_DR)
    stays_DD = _count_common(_numbered(home_DR), _numbered(kind_DR))
    chosen_D, is_free_D = np.empty(num_ranks, np.int64), np.ones(num_ranks, bool)
    waiting = [(-most, rank) for rank, most in enumerate(stays_DD.max(axis=1).tolist())]
    heapq.heapify(waiting)
    while waiting:
        before, rank = heapq.heappop(waiting)
        own_D = np.where(is_free_D, stays_DD[rank], -1)
        bundle = int(own_D.argmax())
        if -int(own_D[bundle]) > before:  # what it had hoped for is gone
            heapq.heappush(waiting, (-int(own_D[bundle]), rank))
            continue
        chosen_D[rank], is_free_D[bundle] = bundle, False
    return chosen_D


def _count_common(one_DR: np.ndarray, other_DR: np.ndarray) -> np.ndarray:
    """How many numbers each row of one table has in common with each of the other; int [D, D]."""
    num_ranks, num_rows = one_DR.shape
    known_K, one_N = np.unique(one_DR, return_inverse=True)
    if len(known_K) <= _FEW:  # each is in many rows: as a product of two tables of what is in which
        has_DK, has_KD = (np.zeros((num_ranks, len(known_K) + 1), np.float32) for _ in range(2))
        rank_N, at_N = np.arange(one_DR.size) // num_rows, known_K.searchsorted(other_DR.ravel())
        at_N[known_K[at_N.clip(max=len(known_K) - 1)] != other_DR.ravel()] = len(known_K)
        has_DK[rank_N, one_N.ravel()] = has_KD[rank_N, at_N] = 1
        has_KD[:, -1] = 0
        return (has_DK @ has_KD.T).astype(np.int16)
    order_N = np.argsort(other_DR, axis=None, kind="stable")
    sorted_N, one_N = other_DR.ravel()[order_N], one_DR.ravel()
    first_N = sorted_N.searchsorted(one_N)
    count_N = sorted_N.searchsorted(one_N, side="right") - first_N
    common_DD = 0
    for start in range(0, len(one_N), _AT_ONCE):  # a frequent number is in many pairs
        count, first = count_N[start : start + _AT_ONCE], first_N[start : start + _AT_ONCE]
        rank_P = np.repeat((start + np.arange(len(count))) // num_rows, count)
        place_P = np.arange(len(rank_P)) + np.repeat(first - (count.cumsum() - count), count)
        pair_P = rank_P * num_ranks + order_N[place_P] // num_rows
        common_DD = common_DD + np.bincount(pair_P, minlength=num_ranks * num_ranks).astype(np.int16)
    return common_DD.reshape(num_ranks, num_ranks)


def _fill(kind_DR: np.ndarray, home_DR: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """The row of each place, whose kind is given: one of its own rank where there is one, then by key; int64 [D, R]."""
    num_ranks, num_rows = kind_DR.shape
    number_N = np.arange(num_ranks * num_rows)
    rank_N = number_N // num_rows
    span = int(home_DR.max() + 1) * num_rows
    by_key_DR = np.argsort(key_N.reshape(num_ranks, num_rows), axis=1, kind="stable")
    sorted_DR = np.take_along_axis(home_DR, by_key_DR, axis=1)
    own_N, row_N = (
        (_numbered(sorted_DR) + np.arange(num_ranks)[:, None] * span).ravel(),
        (by_key_DR + np.arange(num_ranks)[:, None] * num_rows).ravel(),
    )
    place_N = (_numbered(kind_DR) + np.arange(num_ranks)[:, None] * span).ravel()
    stays_N, in_rows_N, in_places_N = np.intersect1d(own_N, place_N, assume_unique=True, return_indices=True)
    from_N = np.full(len(number_N), -1)
    from_N[in_places_N] = row_N[in_rows_N]
    is_left_N = np.ones(len(number_N), bool)
    is_left_N[row_N[in_rows_N]] = False
    left_Y, open_Y = np.flatnonzero(is_left_N), np.flatnonzero(from_N < 0)
    left_Y = left_Y[np.lexsort((rank_N[left_Y], key_N[left_Y], home_DR.ravel()[left_Y]))]
    from_N[open_Y[np.argsort(kind_DR.ravel()[open_Y], kind="stable")]] = left_Y
    return from_N.reshape(num_ranks, num_rows)
