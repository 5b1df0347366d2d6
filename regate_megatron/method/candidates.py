"""Positions that may be left out, in groups with a share of their own, beside positions that always run.

A *sort* is a kind of candidate (the targets; visual positions). A *group* is a set of candidates of one sort in one row
with a share of its own: the targets of a sample, the visual positions of an image. A group of n candidates

- *asks* for ``max(least, ceil(p·n))`` of them, p the keep ratio of its sort,
- never gets fewer than its *floor*, ``max(least, ceil(p·n/2))``,
- where ``least`` (0 unless its sort says more) is at most n.

So how many positions rows ask for follows from counts alone, before any score is known. Unless the ratio is a share of
the global batch: then scores say what each group asks for (:mod:`.threshold`).

Shapes: R rows of this rank in a step, M microbatches of R/M adjacent rows that share one length, G groups, X
candidates, both in order of rows; within a row by sort, then by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sort:
    """The candidates of one sort in a rank's rows.

    Attributes:
        count_G: candidates of each group, int64.
        row_G: the row of each group, int64, ascending.
        keep_ratio: p, in (0, 1].
        score_X: larger is kept first, float64; in order of groups, then positions. None: lengths alone are asked for.
        least_G: the fewest of each group that run, int64; None: none.
        asked_G: how many of each group are asked for, its floor at least, where that is no share of its own; int64.
    """

    count_G: Tensor
    row_G: Tensor
    keep_ratio: float
    score_X: Tensor | None = None
    least_G: Tensor | None = None
    asked_G: Tensor | None = None

    @cached_property
    def ask_G(self) -> Tensor:
        """How many of each group are asked for; int64."""
        return self.asked_G if self.asked_G is not None else self._at_least(ceil_share(self.keep_ratio, self.count_G))

    @cached_property
    def floor_G(self) -> Tensor:
        """How many of each group run at least; int64."""
        return self._at_least(ceil_share(self.keep_ratio, self.count_G, 2))

    def _at_least(self, share_G: Tensor) -> Tensor:
        return share_G if self.least_G is None else torch.maximum(share_G, torch.minimum(self.least_G, self.count_G))


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """All that may be left out of one rank's rows in one step; on the CPU.

    Attributes:
        always_R: positions that always run, int64.
        dense_M: dense length of each microbatch, int64.
        key_M: a content key of each microbatch, int64; breaks ties of ``balanced`` alike wherever a row is.
        sorts: the sorts, in the order in which a row prefers them.
    """

    always_R: Tensor
    dense_M: Tensor
    key_M: Tensor
    sorts: tuple[Sort, ...]

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return len(self.always_R) // len(self.dense_M)

    @cached_property
    def ask_R(self) -> Tensor:
        """Positions that each row asks for, those that always run included; int64."""
        return self._with_always([one.ask_G for one in self.sorts])

    @cached_property
    def floor_R(self) -> Tensor:
        """Positions that each row runs at least; int64."""
        return self._with_always([one.floor_G for one in self.sorts])

    @cached_property
    def full_R(self) -> Tensor:
        """Positions of each row with all candidates; int64."""
        return self._with_always([one.count_G for one in self.sorts])

    @cached_property
    def row_G(self) -> Tensor:
        """The row of each group; int64, ascending."""
        return self._by_row([one.row_G for one in self.sorts])

    @cached_property
    def count_G(self) -> Tensor:
        """Candidates of each group; int64."""
        return self._by_row([one.count_G for one in self.sorts])

    @cached_property
    def floor_G(self) -> Tensor:
        """Floor of each group; int64."""
        return self._by_row([one.floor_G for one in self.sorts])

    @cached_property
    def ask_G(self) -> Tensor:
        """Ask of each group; int64."""
        return self._by_row([one.ask_G for one in self.sorts])

    @cached_property
    def kind_G(self) -> Tensor:
        """The row and the sort of each group as one number, by row and then in the order of ``sorts``; int64."""
        return self._by_row([one.row_G * len(self.sorts) + number for number, one in enumerate(self.sorts)])

    def sum_by_kind(self, value_G: Tensor) -> np.ndarray:
        """The sum of each row's groups of each of Z sorts; int64 [R, Z]."""
        shape = len(self.always_R), len(self.sorts)
        total_Y = np.bincount(self.kind_G.numpy(), weights=value_G.numpy(), minlength=shape[0] * shape[1])
        return total_Y.astype(np.int64).reshape(shape)

    @cached_property
    def group_X(self) -> Tensor:
        """The group of each candidate; int64, ascending."""
        return torch.arange(len(self.row_G)).repeat_interleave(self.count_G)

    @cached_property
    def row_X(self) -> Tensor:
        """The row of each candidate; int64, ascending."""
        return self.row_G.repeat_interleave(self.count_G)

    @cached_property
    def score_X(self) -> Tensor:
        """The score of each candidate; float64."""
        score_X = torch.cat([one.score_X for one in self.sorts])
        return score_X if len(self.sorts) == 1 else score_X[self._order_X]

    def by_sort(self, values_X: Tensor) -> tuple[Tensor, ...]:
        """Values of all candidates, one tensor per sort, each in the order of that sort's scores."""
        if len(self.sorts) == 1:
            return (values_X,)
        in_order_X = torch.empty_like(values_X)
        in_order_X[self._order_X] = values_X
        return in_order_X.split([int(one.count_G.sum()) for one in self.sorts])

    def longest(self, value_R: Tensor) -> Tensor:
        """The largest value of each microbatch's rows; [M]."""
        return value_R.view(len(self.dense_M), -1).amax(dim=1)

    @cached_property
    def _order_G(self) -> Tensor:
        """Where each group stands in the sorts laid one after the other; int64."""
        return torch.cat([one.row_G for one in self.sorts]).argsort(stable=True)

    @cached_property
    def _order_X(self) -> Tensor:
        """Where each candidate stands in the sorts laid one after the other; int64."""
        count_G = torch.cat([one.count_G for one in self.sorts])
        start_G = (count_G.cumsum(0) - count_G)[self._order_G]  # there; less where it starts here:
        moved_G = start_G - (self.count_G.cumsum(0) - self.count_G)
        return torch.arange(int(count_G.sum())) + moved_G.repeat_interleave(self.count_G)

    def _by_row(self, values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.cat(list(values))[self._order_G]

    def _with_always(self, counts: Sequence[Tensor]) -> Tensor:
        total_R = self.always_R.clone()
        for count_G, one in zip(counts, self.sorts, strict=True):
            total_R.index_add_(0, one.row_G, count_G)
        return total_R


def ceil_share(ratio: float, count_R: Tensor, divisor: int = 1) -> Tensor:
    """``ceil(ratio·count/divisor)`` exactly: a ratio of 0.1 means one tenth, not its nearest float."""
    share = Fraction(str(ratio)) / divisor
    most = int(count_R.max()) if count_R.numel() else 0
    if share.numerator * most + share.denominator < 2**63:
        return (share.numerator * count_R + share.denominator - 1) // share.denominator
    # Python's integers: a ratio of 17 digits times a count overflows int64
    return torch.tensor([math.ceil(share * count) for count in count_R.tolist()], dtype=torch.int64)
