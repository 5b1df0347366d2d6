"""How many positions each row keeps, in lengths that balance the work over data-parallel ranks. Torch only.

With c context positions, T targets and keep ratio p a row asks for ``c + ceil(p·T)`` positions and never gets fewer
than ``c + ceil(p·T/2)``.

- ``per-sample``: every row gets what it asks for (the paper's rule); ranks may differ.
- ``uniform``: one length for every row of every rank in a step, the larger of the mean ask over the global batch and
  the largest floor, aligned up, capped at the dense length. Rows with room keep more of their own best targets, then
  fill.

Shapes: R rows of this rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

AllReduce = Callable[[Tensor, str], Tensor]
"""``f(values, op)`` with op "sum" or "max": reduce an int64 vector over the planners of all data-parallel ranks."""


@dataclass(frozen=True)
class Budget:
    """What the rows of this rank keep.

    Attributes:
        length_R: positions each row runs, fill included; int64 [R].
        num_keep_R: targets each row keeps; int64 [R].
    """

    length_R: Tensor
    num_keep_R: Tensor


def ceil_share(ratio: float, count_R: Tensor, divisor: int = 1) -> Tensor:
    """``ceil(ratio·count/divisor)`` exactly: a ratio of 0.1 means one tenth, not its nearest float."""
    share = Fraction(str(ratio)) / divisor  # Python's integers: a ratio of 17 digits times a count overflows int64
    return torch.tensor([math.ceil(share * count) for count in count_R.tolist()], dtype=torch.int64)


def align_up(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``length``."""
    return -(-length // multiple) * multiple


def align_length(length: int, dense_length: int, *, multiple: int, extra_multiple: int) -> int:
    """Align ``length`` up to ``multiple`` (the layout's need) and ``extra_multiple``, never beyond the dense length.

    A dense length is legal for the layout by itself, so the cap needs no alignment of its own.
    """
    return min(align_up(max(length, 1), math.lcm(multiple, extra_multiple)), dense_length)


def plan_budget(
    num_context_R: Tensor,
    num_target_R: Tensor,
    dense_length_R: Tensor,
    *,
    kind: str,
    keep_ratio: float,
    multiple: int,
    extra_multiple: int,
    rows_per_microbatch: int,
    all_reduce: AllReduce,
) -> Budget:
    """Lengths and kept targets of this rank's rows in one step.

    Called by the planner of every data-parallel replica; ``uniform`` communicates over all of them, once per reduction.

    Args:
        num_context_R, num_target_R, dense_length_R: int64 [R].
        kind: "uniform" or "per-sample".
        multiple, extra_multiple: alignment, see :func:`align_length`.
        rows_per_microbatch: rows of one microbatch are adjacent and share one length.
        all_reduce: see :data:`AllReduce`.
    """
    ask_R = num_context_R + ceil_share(keep_ratio, num_target_R)
    if kind == "uniform":
        floor_R = num_context_R + ceil_share(keep_ratio, num_target_R, 2)
        totals = all_reduce(torch.stack([ask_R.sum(), torch.tensor(len(ask_R))]), "sum")
        largest_floor = int(all_reduce(floor_R.max().reshape(1), "max"))
        length = max(-(-int(totals[0]) // int(totals[1])), largest_floor)
        lengths = [
            align_length(length, dense, multiple=multiple, extra_multiple=extra_multiple)
            for dense in dense_length_R.tolist()
        ]
        length_R = torch.tensor(lengths)
        return Budget(length_R, torch.minimum(num_target_R, length_R - num_context_R).clamp_min(0))
    # Rows of one microbatch share a tensor: the longest row sets its length, the others fill.
    longest_M = ask_R.view(-1, rows_per_microbatch).amax(dim=1)
    lengths = [
        align_length(length, dense, multiple=multiple, extra_multiple=extra_multiple)
        for length, dense in zip(longest_M.tolist(), dense_length_R[::rows_per_microbatch].tolist(), strict=True)
    ]
    return Budget(torch.tensor(lengths).repeat_interleave(rows_per_microbatch), ceil_share(keep_ratio, num_target_R))
