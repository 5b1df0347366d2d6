"""Scores and a budget to kept positions. Torch only; every function is exact and the same on every rank.

Shapes: R rows, S positions of the merged sequence, K kept positions per row.
"""

import torch
from torch import Tensor


def keep_best_targets(score_RS: Tensor, is_target_RS: Tensor, num_keep_R: Tensor) -> Tensor:
    """Mark the ``num_keep_R`` best-scored targets of each row; bool [R, S].

    Ties go to the lower position, so that every rank and every layout picks the same set. NaN ranks last.
    """
    lowest = torch.finfo(score_RS.dtype).min
    score_RS = score_RS.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)  # a target is never below the others
    order_RS = torch.where(is_target_RS, score_RS, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_S = torch.arange(score_RS.shape[1]).expand_as(order_RS)
    rank_RS = torch.empty_like(order_RS).scatter_(1, order_RS, rank_S)
    return is_target_RS & (rank_RS < num_keep_R[:, None])


def pack_positions(kept_RS: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Kept positions of each row in ascending order, then fill up to ``length``.

    Fill slots come last, so that under causal attention no kept position reads them, and point at position 0. They are
    counted nowhere and have no loss.

    Returns:
        keep_idx_RK: int64 [R, K] with K = ``length``.
        num_kept_R: int64 [R], how many leading slots are real.

    Raises:
        ValueError: a row keeps more than ``length`` positions.
    """
    num_kept_R = kept_RS.sum(dim=1)
    if int(num_kept_R.max()) > length:
        raise ValueError(f"a row keeps {int(num_kept_R.max())} positions, more than the length {length}")
    row_X, position_X = kept_RS.nonzero(as_tuple=True)
    slot_RS = kept_RS.cumsum(dim=1) - 1
    keep_idx_RK = torch.zeros(len(kept_RS), length, dtype=torch.int64)
    keep_idx_RK[row_X, slot_RS[row_X, position_X]] = position_X
    return keep_idx_RK, num_kept_R
