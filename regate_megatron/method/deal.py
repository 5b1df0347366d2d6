"""``dealt``: microbatches of the global batch go to the ranks that their short lengths ask for. Pure numpy.

Each runs at its own length; what is decided here is where. All planners know all lengths and compute the same.

**Columns.** Microbatches, falling by length, are cut into *columns* of D adjacent ones, one for each rank: microbatch i
of all ranks comes from one column. So ranks that wait for each other in every microbatch (experts, pipelines) run
near-equal lengths in each. *No deal waits less:* of what ranks run at a time, the longest of the k-th longest has at
least ``(k-1)·D`` others that are as long or longer, and in sorted columns exactly those.

**Within columns** each rank gets one of every column, so that totals are as equal as may be, by two methods; the one
whose slowest rank is faster is taken, the first where they are alike.

- *turns* (:func:`by_turns`): columns one after the other, the most uneven first; the longest microbatch goes to the
  rank that has least so far.
- *differencing* (:func:`by_differencing`): the largest differencing method of Karmarkar and Karp with as many for each
  (Michiels et al., balanced LDM; verl balances its sequences alike). The two columns of the largest spread are merged,
  longest to shortest, until one is left.

**Across columns.** Where no rank waits for another before the step ends, totals count alone: then the slowest rank
swaps a microbatch with the fastest, the pair that brings them closest, until that gains nothing (:func:`by_swaps`). An
outlier in the first column has no match in the others, which are all but alike.

**Staying home.** Microbatches of one length stand for each other, so what is dealt are lengths: bundles of them, one
for each rank. Ranks choose bundles by how many lengths they hold of each, the largest number first; a microbatch whose
length its rank keeps stays. Where microbatches at home run as well as dealt ones, none moves.

**Order.** The shortest microbatches come first and last, the longest in the middle: a pipeline idles while the first
one goes down and the last one comes up.

Ties go to the lower content key, then to the lower rank at home.

Shapes: D ranks, M microbatches of each, N = D·M microbatches.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

_EVEN = 1.001  # max/mean that no swap is looked for any more
_FEW = 512  # different numbers
_AT_ONCE = 8192  # microbatches whose pairs are in memory at a time


@dataclass(frozen=True)
class Deal:
    """Who runs which microbatch.

    Attributes:
        from_DM: the microbatch that each place gets, as rank · M + number at home; every one once; int64.
        method: "home", "turns" or "differencing".
        total_D: positions of each rank, int64.
        longest_M: of each microbatch the longest length on any rank, int64.
    """

    from_DM: np.ndarray
    method: str
    total_D: np.ndarray
    longest_M: np.ndarray

    @property
    def num_moved(self) -> int:
        """Microbatches that leave their rank."""
        home_D1 = np.arange(len(self.from_DM))[:, None]
        return int((self.from_DM // self.from_DM.shape[1] != home_D1).sum())


def deal(length_DM: np.ndarray, key_DM: np.ndarray, *, in_columns: bool = True) -> Deal:
    """Deal the microbatches of a global batch; the same on every rank that knows the same.

    Args:
        length_DM: positions that each microbatch runs, by the rank and the place it has now; int64.
        key_DM: content keys, int64.
        in_columns: whether ranks wait for each other in every microbatch, so that those at home must be as even in
            each.
    """
    shape, key_N = length_DM.shape, key_DM.ravel()
    if not np.ptp(length_DM):  # nothing to deal, nor another order to run them in
        return Deal(np.arange(length_DM.size).reshape(shape), "home", length_DM.sum(axis=1), length_DM[0])
    kind_DM = np.unique(-length_DM, return_inverse=True)[1].reshape(shape)  # those of one kind stand for each other
    column_MD = np.lexsort((key_N, kind_DM.ravel())).reshape(shape[::-1])
    length_MD = length_DM.ravel()[column_MD]
    method, place_MD = _better(length_MD)
    bundle_MD, length_MD = (np.take_along_axis(values_MD, place_MD, axis=1) for values_MD in (column_MD, length_MD))
    if not in_columns:
        swapped_MD = by_swaps(length_MD)
        bundle_MD, length_MD = (values_MD.ravel()[swapped_MD] for values_MD in (bundle_MD, length_MD))
    total_D, longest_M = length_MD.sum(axis=0), length_MD.max(axis=1)
    home = _at_home(length_DM)
    waits_less = not in_columns or home.longest_M.sum() <= longest_M.sum()
    if home.total_D.max() <= total_D.max() and waits_less:
        return home
    middle_M = _longest_in_the_middle(shape[1])
    dealt_DM = kind_DM.ravel()[bundle_MD[middle_M].T]
    chosen_D = _choose(kind_DM, dealt_DM)
    from_DM = _fill(dealt_DM[chosen_D], kind_DM, key_N)
    return Deal(from_DM, method, total_D[chosen_D], longest_M[middle_M])


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
    """Swaps across columns: where in [M, D] each length of the new bundles was, falling by length; int64 [M, D]."""
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


def _at_home(length_DM: np.ndarray) -> Deal:
    """No microbatch leaves its rank; they change their order there."""
    num_ranks, num_micro = length_DM.shape
    falling_DM = np.argsort(-length_DM, axis=1, kind="stable")[:, _longest_in_the_middle(num_micro)]
    from_DM = np.arange(num_ranks)[:, None] * num_micro + falling_DM
    return Deal(from_DM, "home", length_DM.sum(axis=1), length_DM.ravel()[from_DM].max(axis=0))


def _numbered(kind_DM: np.ndarray) -> np.ndarray:
    """The same kinds as numbers that are told apart within a rank: its first of a kind, its second …; int64 [D, M]."""
    order_DM = np.argsort(kind_DM, axis=1, kind="stable")
    sorted_DM = np.take_along_axis(kind_DM, order_DM, axis=1)
    place_M = np.arange(kind_DM.shape[1])
    is_first_DM = np.diff(sorted_DM, axis=1, prepend=-1) != 0
    start_DM = np.maximum.accumulate(np.where(is_first_DM, place_M, 0), axis=1)
    numbered_DM = np.empty_like(kind_DM)
    np.put_along_axis(numbered_DM, order_DM, sorted_DM * len(place_M) + place_M - start_DM, axis=1)
    return numbered_DM


def _choose(home_DM: np.ndarray, kind_DM: np.ndarray) -> np.ndarray:
    """The bundle of each rank, that keeps most of its microbatches at home, the largest numbers first; int64 [D]."""
    num_ranks = len(kind_DM)
    stays_DD = _count_common(_numbered(home_DM), _numbered(kind_DM))
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


def _count_common(one_DM: np.ndarray, other_DM: np.ndarray) -> np.ndarray:
    """How many numbers each row of one table has in common with each of the other; int [D, D]."""
    num_ranks, num_micro = one_DM.shape
    known_K, one_N = np.unique(one_DM, return_inverse=True)
    if len(known_K) <= _FEW:  # each is in many rows: as a product of two tables of what is in which
        has_DK, has_KD = (np.zeros((num_ranks, len(known_K) + 1), np.float32) for _ in range(2))
        rank_N, at_N = np.arange(one_DM.size) // num_micro, known_K.searchsorted(other_DM.ravel())
        at_N[known_K[at_N.clip(max=len(known_K) - 1)] != other_DM.ravel()] = len(known_K)
        has_DK[rank_N, one_N.ravel()] = has_KD[rank_N, at_N] = 1
        has_KD[:, -1] = 0
        return (has_DK @ has_KD.T).astype(np.int16)
    order_N = np.argsort(other_DM, axis=None, kind="stable")
    sorted_N, one_N = other_DM.ravel()[order_N], one_DM.ravel()
    first_N = sorted_N.searchsorted(one_N)
    count_N = sorted_N.searchsorted(one_N, side="right") - first_N
    common_DD = 0
    for start in range(0, len(one_N), _AT_ONCE):  # a frequent number is in many pairs
        count, first = count_N[start : start + _AT_ONCE], first_N[start : start + _AT_ONCE]
        rank_P = np.repeat((start + np.arange(len(count))) // num_micro, count)
        place_P = np.arange(len(rank_P)) + np.repeat(first - (count.cumsum() - count), count)
        pair_P = rank_P * num_ranks + order_N[place_P] // num_micro
        common_DD = common_DD + np.bincount(pair_P, minlength=num_ranks * num_ranks).astype(np.int16)
    return common_DD.reshape(num_ranks, num_ranks)


def _fill(kind_DM: np.ndarray, home_DM: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """The microbatch of each place, of a given kind: one of its own rank where there is one, then by key; [D, M]."""
    num_ranks, num_micro = kind_DM.shape
    number_N = np.arange(num_ranks * num_micro)
    rank_N = number_N // num_micro
    span = int(home_DM.max() + 1) * num_micro
    by_key_DM = np.argsort(key_N.reshape(num_ranks, num_micro), axis=1, kind="stable")
    sorted_DM = np.take_along_axis(home_DM, by_key_DM, axis=1)
    own_N, home_N = (
        (_numbered(sorted_DM) + np.arange(num_ranks)[:, None] * span).ravel(),
        (by_key_DM + np.arange(num_ranks)[:, None] * num_micro).ravel(),
    )
    place_N = (_numbered(kind_DM) + np.arange(num_ranks)[:, None] * span).ravel()
    stays_N, in_own_N, in_places_N = np.intersect1d(own_N, place_N, assume_unique=True, return_indices=True)
    from_N = np.full(len(number_N), -1)
    from_N[in_places_N] = home_N[in_own_N]
    is_left_N = np.ones(len(number_N), bool)
    is_left_N[home_N[in_own_N]] = False
    left_Y, open_Y = np.flatnonzero(is_left_N), np.flatnonzero(from_N < 0)
    left_Y = left_Y[np.lexsort((rank_N[left_Y], key_N[left_Y], home_DM.ravel()[left_Y]))]
    from_N[open_Y[np.argsort(kind_DM.ravel()[open_Y], kind="stable")]] = left_Y
    return from_N.reshape(num_ranks, num_micro)
