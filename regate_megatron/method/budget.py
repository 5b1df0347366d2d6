"""How many positions each row asks for, and the lengths of ``uniform`` and ``per-sample``. Torch only.

With c context positions, T targets and keep ratio p a row asks for ``c + ceil(p·T)`` positions and never gets fewer
than ``c + ceil(p·T/2)``. A packed row counts as its samples (each with its own share and floor) or as one.

- ``per-sample``: every row gets what it asks for (the paper's rule); ranks may differ.
- ``uniform``: one length for every row of every rank in a step, the larger of the mean ask over the global batch and
  the largest floor, aligned up, capped at the dense length. Rows with room keep more of their own best targets, then
  fill.
- ``balanced``: one total for every rank; see :mod:`regate_megatron.method.balance`.

**Few lengths.** torch.compile and buffers of MoE layers want few distinct lengths, so lengths are rounded up to a
multiple of :func:`length_step`.

Shapes: R rows of this rank in a step, M microbatches of R/M adjacent rows that share one length, G groups of targets
with a share of their own (rows, or samples of packed rows; in order of rows), D data-parallel ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

AllGather = Callable[[Tensor], Tensor]
"""``f(values)``: stack an int64 vector of the planner of every data-parallel rank; [k] -> [D, k]."""

LENGTHS = 32
"""The step is the largest power of two up to 1/32 of the dense length: at most 64 lengths, 32 for a power of two."""


@dataclass(frozen=True)
class Demand:
    """Positions that this rank's rows ask for; all int64.

    Attributes:
        context_R: context positions that must run.
        floor_R, ask_R: context and the least, the asked number of targets.
        full_R: context and all targets.
        floor_G, ask_G: the least, the asked number of targets of each group.
        row_G: the row of each group, ascending.
        dense_M: dense length of each microbatch.
    """

    context_R: Tensor
    floor_R: Tensor
    ask_R: Tensor
    full_R: Tensor
    floor_G: Tensor
    ask_G: Tensor
    row_G: Tensor
    dense_M: Tensor

    def longest(self, value_R: Tensor) -> Tensor:
        """The largest value of each microbatch's rows; [M]."""
        return value_R.view(len(self.dense_M), -1).amax(dim=1)

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return len(self.context_R) // len(self.dense_M)


@dataclass(frozen=True)
class Alignment:
    """What lengths are a multiple of.

    Attributes:
        layout: what the layout needs (SP, CP, FP8).
        extra: what the user asks for beside it; None: :func:`length_step` of the dense length.
    """

    layout: int = 1
    extra: int | None = None

    def coarse(self, dense_length: int) -> int:
        """The step without the layout's part: the same in every layout."""
        return self.extra or length_step(dense_length)

    def step(self, dense_length: int) -> int:
        """The step of lengths under a dense length."""
        return math.lcm(self.layout, self.coarse(dense_length))

    def align(self, length: int, dense_length: int) -> int:
        """``length`` up to the next step, never beyond the dense length, which is legal for the layout by itself."""
        return min(align_up(max(length, 1), self.step(dense_length)), dense_length)

    def align_each(self, length_M: Tensor, dense_M: Tensor) -> Tensor:
        """:meth:`align` of every microbatch."""
        pairs = zip(length_M.tolist(), dense_M.tolist(), strict=True)
        return torch.tensor([self.align(length, dense) for length, dense in pairs])


def length_step(dense_length: int) -> int:
    """The largest power of two up to ``dense_length / 32``: steps of other dense lengths divide it or are divided."""
    return 1 << max(0, (dense_length // LENGTHS).bit_length() - 1)


def align_up(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``length``."""
    return -(-length // multiple) * multiple


def ceil_share(ratio: float, count_R: Tensor, divisor: int = 1) -> Tensor:
    """``ceil(ratio·count/divisor)`` exactly: a ratio of 0.1 means one tenth, not its nearest float."""
    share = Fraction(str(ratio)) / divisor
    most = int(count_R.max()) if count_R.numel() else 0
    if share.numerator * most + share.denominator < 2**63:
        return (share.numerator * count_R + share.denominator - 1) // share.denominator
    # Python's integers: a ratio of 17 digits times a count overflows int64
    return torch.tensor([math.ceil(share * count) for count in count_R.tolist()], dtype=torch.int64)


def demand_of(
    num_context_R: Tensor, num_target_G: Tensor, row_G: Tensor, dense_M: Tensor, *, keep_ratio: float
) -> Demand:
    """What rows ask for; see :class:`Demand`."""

    def with_context(count_G: Tensor) -> Tensor:
        return num_context_R.clone().index_add_(0, row_G, count_G)

    floor_G, ask_G = ceil_share(keep_ratio, num_target_G, 2), ceil_share(keep_ratio, num_target_G)
    return Demand(
        context_R=num_context_R,
        floor_R=with_context(floor_G),
        ask_R=with_context(ask_G),
        full_R=with_context(num_target_G),
        floor_G=floor_G,
        ask_G=ask_G,
        row_G=row_G,
        dense_M=dense_M,
    )


def per_sample_lengths(demand: Demand, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Lengths [M] and the number of targets each row keeps [R], exactly its ask; no communication.

    Rows of one microbatch share a tensor: the longest row sets its length, the others fill.
    """
    length_M = alignment.align_each(demand.longest(demand.ask_R), demand.dense_M)
    return length_M, demand.ask_R - demand.context_R


def uniform_lengths(demand: Demand, alignment: Alignment, all_gather: AllGather) -> tuple[Tensor, Tensor]:
    """Lengths [M] and the number of targets each row keeps [R]; the planners of all data-parallel ranks call this.

    What the layout's alignment adds beyond the common length is fill, so that every layout keeps the same targets. It
    adds nothing where the step is a multiple of what the layout needs.
    """
    own = [int(demand.ask_R.sum()), len(demand.ask_R), int(demand.floor_R.max()), int(demand.dense_M.max())]
    table_D4 = all_gather(torch.tensor(own))
    asked, rows = table_D4[:, :2].sum(dim=0).tolist()
    largest_floor, largest_dense = table_D4[:, 2:].amax(dim=0).tolist()
    common = align_up(max(-(-asked // rows), largest_floor, 1), alignment.coarse(largest_dense))
    length = align_up(common, alignment.step(largest_dense))
    room_R = demand.dense_M.clamp_max(common).repeat_interleave(demand.rows) - demand.context_R
    num_target_R = demand.full_R - demand.context_R
    return demand.dense_M.clamp_max(length), torch.minimum(num_target_R, room_R).clamp_min(0)
