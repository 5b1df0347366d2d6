"""One threshold for the global batch: what each group keeps where the keep ratio is a share of the whole batch. Pure.

**The rule.** Of the T targets of a global batch ``max(ceil(p·T), floors)`` run: of every group its floor's best, and of
all others the best, whichever group they are of. (Optimal for the reason :mod:`.selection` gives.) With a least score
only others above it do, so that fewer run: what falls with what is left to learn lies between floors and ``ceil(p·T)``.

**Ties** go to the lower place in the group, then to the lower content key, then to the earlier row of the global batch,
so that every layout keeps the same; rows that are told apart by nothing but the last hold the same.

**How it is found.** The planners hold a part of the candidates each, and none sees all. What orders them is read as
digits of :data:`DIGIT` bits: the planners count theirs by the first digit and sum the counts, so that all know the
digit at which the number asked for is reached; above it all are taken, below it none, and those in it are told apart by
the next digit. It ends as soon as all that are left are wanted: after three or four sums of 2,048 counts for scores
that hardly repeat, however many targets there are.

Shapes: G groups of this planner, X of their candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from regate_megatron.method.selection import rank_targets

DIGIT = 11  # bits: 16 KB of counts, and six digits to a score
_PLACES, _ORDERS = 33, 55  # bits of a place in a group, and of a group's number in the global batch

Sum = Callable[[Tensor], Tensor]
"""``f(counts)``: the sum of an int64 vector over all planners; each calls it."""

Word = tuple[Callable[[np.ndarray], np.ndarray], int]
"""What orders candidates, of those at some places: unsigned integers, larger first; and how many bits they have."""


def above_threshold(
    score_X: Tensor,
    count_G: Tensor,
    floor_G: Tensor,
    *,
    key_G2: Tensor,
    order_G: Tensor,
    keep_ratio: float,
    least_score: float | None,
    sum_over_planners: Sum,
) -> Tensor:
    """Mark what the global batch keeps of this planner's candidates; bool [X]. All planners call this.

    Args:
        score_X: finite, float64; group by group, in order of positions.
        count_G, floor_G: candidates of each group, and the fewest that run; int64.
        key_G2: content keys, int64.
        order_G: a number of each group that no other of the global batch has, 0 or more, below 2**55; int64.
        keep_ratio: p.
        least_score: beyond floors only what scores more runs; None: all may.
    """
    group_X = torch.arange(len(count_G)).repeat_interleave(count_G)
    kept_X = rank_targets(score_X, group_X, group_X, floor_G) < floor_G[group_X]
    is_open_X = ~kept_X if least_score is None else ~kept_X & (score_X > least_score)
    own_3 = torch.stack([count_G.sum(), kept_X.sum(), is_open_X.sum()])
    total, floors, others = sum_over_planners(own_3).tolist()
    number = min(others, math.ceil(Fraction(str(keep_ratio)) * total) - floors)
    group, score, first_G = group_X.numpy(), score_X.numpy(), (count_G.cumsum(0) - count_G).numpy()
    key_G2, order = key_G2.numpy(), order_G.numpy()
    words: tuple[Word, ...] = (
        (lambda at: _rising(score[at]), 64),
        (lambda at: (1 << _PLACES) - 1 - (at - first_G[group[at]]).astype(np.uint64), _PLACES),
        (lambda at: ~_unsigned(key_G2[group[at], 0]), 64),
        (lambda at: ~_unsigned(key_G2[group[at], 1]), 64),
        (lambda at: (1 << _ORDERS) - 1 - order[group[at]].astype(np.uint64), _ORDERS),
    )
    for taken_Y in _largest(is_open_X.numpy().nonzero()[0], words, number, others, sum_over_planners):
        kept_X.numpy()[taken_Y] = True
    return kept_X


def _largest(
    open_Y: np.ndarray, words: Sequence[Word], number: int, total: int, sum_over_planners: Sum
) -> Iterator[np.ndarray]:
    """Where the ``number`` largest of the ``total`` are that all planners hold, part by part.

    Args:
        open_Y: where this planner's are.
        words: what orders them, the first first. No two candidates have all alike.
    """
    if number <= 0:
        return
    digits = ((word, high, max(high - DIGIT, 0)) for word, bits in words for high in range(bits, 0, -DIGIT))
    while number < total:
        word, high, low = next(digits)
        digit_Y = (word(open_Y) >> np.uint64(low)).astype(np.int64) & ((1 << (high - low)) - 1)
        own_C = torch.from_numpy(np.bincount(digit_Y, minlength=1 << DIGIT))
        count_C = sum_over_planners(own_C).numpy()
        reached_C = count_C[::-1].cumsum()[::-1]  # by this digit or a larger one
        edge = int(np.flatnonzero(reached_C >= number)[-1])
        yield open_Y[digit_Y > edge]
        number, total = number - int(reached_C[edge] - count_C[edge]), int(count_C[edge])
        open_Y = open_Y[digit_Y == edge]
    yield open_Y


def _rising(score_X: np.ndarray) -> np.ndarray:
    """Scores as unsigned integers in the same order; uint64."""
    bits_X = (score_X + 0.0).view(np.uint64)  # minus zero is zero
    return np.where(bits_X >> np.uint64(63) == 1, ~bits_X, bits_X | np.uint64(1 << 63))


def _unsigned(key_X: np.ndarray) -> np.ndarray:
    """Signed integers as unsigned ones in the same order; uint64."""
    return key_X.view(np.uint64) ^ np.uint64(1 << 63)
