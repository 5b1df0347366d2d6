"""How many positions each row runs: what lengths are a multiple of, and the budgets ``uniform`` and ``per-sample``.

What rows ask for, and the floors below which they do not go, is in :mod:`.candidates`.

- ``per-sample``: every row gets what it asks for (the paper's rule); ranks may differ.
- ``uniform``: one length for every row of every rank in a step, the larger of the mean ask over the global batch and
  the largest floor, aligned up, capped at the dense length. Rows with room keep more of their own best candidates,
  then fill.
- ``balanced``: one total for every rank; see :mod:`regate_megatron.method.balance`.
- ``dealt``: the lengths of ``per-sample``; see :mod:`regate_megatron.method.deal` for which rank runs which.

**Few lengths.** torch.compile and buffers of MoE layers want few distinct lengths, so lengths are rounded up to a
multiple of :func:`length_step`.

Shapes: R rows of this rank in a step, M microbatches of R/M adjacent rows that share one length, D data-parallel ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_megatron.method.candidates import Candidates

AllGather = Callable[[Tensor], Tensor]
"""``f(values)``: stack an int64 vector of the planner of every data-parallel rank; [k] -> [D, k]."""

LENGTHS = 32
"""Lengths go in steps of the largest power of two up to 1/32 of the dense length: 32 of them where that is a power of
two, at most 64 elsewhere."""


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


def per_sample_lengths(candidates: Candidates, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Lengths [M] and the number of candidates each row keeps [R], exactly its ask; no communication.

    Rows of one microbatch share a tensor: the longest row sets its length, the others fill.
    """
    length_M = alignment.align_each(candidates.longest(candidates.ask_R), candidates.dense_M)
    return length_M, candidates.ask_R - candidates.always_R


def uniform_lengths(candidates: Candidates, alignment: Alignment, all_gather: AllGather) -> tuple[Tensor, Tensor]:
    """Lengths [M] and the number of candidates each row keeps [R]; the planners of all data-parallel ranks call this.

    What the layout's alignment adds beyond the common length is fill, so that every layout keeps the same candidates.
    It adds nothing where the step is a multiple of what the layout needs.
    """
    ask_R, dense_M = candidates.ask_R, candidates.dense_M
    own = [int(ask_R.sum()), len(ask_R), int(candidates.floor_R.max()), int(dense_M.max())]
    table_D4 = all_gather(torch.tensor(own))
    asked, rows = table_D4[:, :2].sum(dim=0).tolist()
    largest_floor, largest_dense = table_D4[:, 2:].amax(dim=0).tolist()
    common = align_up(max(-(-asked // rows), largest_floor, 1), alignment.coarse(largest_dense))
    length = align_up(common, alignment.step(largest_dense))
    room_R = dense_M.clamp_max(common).repeat_interleave(candidates.rows) - candidates.always_R
    num_candidates_R = candidates.full_R - candidates.always_R
    return dense_M.clamp_max(length), torch.minimum(num_candidates_R, room_R).clamp_min(0)
