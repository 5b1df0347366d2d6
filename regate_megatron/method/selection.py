"""Scores and lengths to kept positions. Torch and numpy; every function is exact and the same on every rank.

**The rule.** A row that keeps k targets keeps the best-scored set of k that holds the floor of each of its groups: the
floor's best targets of each group, then the best of all others. *It is optimal*: where an allowed set lacks one of a
group's best, swapping it in for a lower one of the group loses nothing and keeps every floor, so some best set holds
the floor's best of each group; the other places are free, and best filled with the best of what remains. (The bases of
a partition matroid with lower bounds.) Ties go to the lower position; NaN is −inf.

How many targets each row keeps is decided before: by counts in ``uniform`` and ``per-sample`` (:mod:`.budget`), by
scores in ``balanced`` (:mod:`.balance`).

Shapes: R rows, S positions of the merged sequence, K kept positions per row, X targets in order of row and position, G
groups of targets (rows, or samples of packed rows; in order).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regate_megatron.method import balance, budget
from regate_megatron.method.budget import Alignment, AllGather


@dataclass(frozen=True)
class Rows:
    """The rows of one rank in one step, M microbatches of R/M adjacent rows; on the CPU.

    Attributes:
        num_context_R: context positions that must run, int64.
        num_target_G: targets of each group, int64.
        row_G: the row of each group, int64, ascending.
        dense_M: dense length of each microbatch, int64.
        key_M: a content key of each microbatch, int64; breaks ties of ``balanced`` alike wherever a row is.
        score_X: float64.
    """

    num_context_R: Tensor
    num_target_G: Tensor
    row_G: Tensor
    dense_M: Tensor
    key_M: Tensor
    score_X: Tensor


@dataclass(frozen=True)
class Selection:
    """What a rank runs.

    Attributes:
        length_M: positions each row of a microbatch runs, fill included; int64.
        is_kept_X: which targets are kept; bool.
        achievable: least max/mean over ranks that any totals could have; ``balanced`` only, else None.
    """

    length_M: Tensor
    is_kept_X: Tensor
    achievable: float | None = None


def select(rows: Rows, *, kind: str, keep_ratio: float, alignment: Alignment, all_gather: AllGather) -> Selection:
    """Lengths and kept targets of this rank's rows.

    Called by the planner of every data-parallel replica; ``uniform`` and ``balanced`` communicate over all of them,
    once.

    Args:
        kind: "uniform", "balanced" or "per-sample".
        keep_ratio: p.
        alignment: what lengths are a multiple of.
        all_gather: see :data:`~regate_megatron.method.budget.AllGather`.
    """
    demand = budget.demand_of(rows.num_context_R, rows.num_target_G, rows.row_G, rows.dense_M, keep_ratio=keep_ratio)
    group_X = torch.arange(len(rows.row_G)).repeat_interleave(rows.num_target_G)
    row_X = rows.row_G.repeat_interleave(rows.num_target_G)
    first_G = demand.ask_G if kind == "per-sample" else demand.floor_G  # what is each group's own
    rank_X = rank_targets(rows.score_X, row_X, group_X, first_G)
    achievable = None
    if kind == "per-sample":
        length_M, num_keep_R = budget.per_sample_lengths(demand, alignment)
    elif kind == "uniform":
        length_M, num_keep_R = budget.uniform_lengths(demand, alignment, all_gather)
    else:
        span = balance.span_of(demand, alignment)
        total, achievable = balance.agree_on_total(demand, span, all_gather)
        length_M = balance.spread_total(
            total,
            span,
            rows=demand.rows,
            score_X=rows.score_X,
            rank_X=rank_X,
            row_X=row_X,
            context_R=rows.num_context_R,
            key_M=rows.key_M,
        )
        num_keep_R = length_M.repeat_interleave(demand.rows) - rows.num_context_R
    return Selection(length_M, rank_X < num_keep_R.index_select(0, row_X), achievable)


def rank_targets(score_X: Tensor, row_X: Tensor, group_X: Tensor, floor_G: Tensor) -> Tensor:
    """The place of each target in the order in which its row keeps targets, from 0; int64 [X].

    The floor's best targets of each group come first, then the others; both by score, ties by position.

    Args:
        row_X, group_X: row and group of each target, int64, ascending.
        floor_G: how many targets of each group come first, int64.
    """
    score_X, row_X, group_X, floor_G = (values.numpy() for values in (score_X, row_X, group_X, floor_G))
    count_R = np.bincount(row_X)
    best, start = [row_X[:0]], 0
    for count in count_R.tolist():
        best.append(_best_first(score_X[start : start + count]) + start)
        start += count
    best_X = np.concatenate(best)  # row by row
    if not np.array_equal(row_X, group_X):  # else the row's best are the group's best
        by_group_X = best_X[_sort(group_X[best_X])]
        place_X = _places(by_group_X, np.bincount(group_X))
        is_other_X = place_X >= floor_G[group_X]
        best_X = best_X[_sort((2 * row_X + is_other_X)[best_X])]
    return torch.from_numpy(_places(best_X, count_R))


def _best_first(score_T: np.ndarray) -> np.ndarray:
    """The order of scores from the best; NaN counts as minus infinity, ties go to the lower position."""
    key_T = np.where(np.isnan(score_T), np.inf, -score_T)
    order_T = key_T.argsort()  # three times as fast as a stable sort; what that would do more follows
    sorted_T = key_T[order_T]
    is_next_T = sorted_T[1:] != sorted_T[:-1]
    if is_next_T.all():
        return order_T
    block_T = np.concatenate([[0], is_next_T.cumsum()]) * len(order_T)  # equal scores are one block
    return np.sort(block_T + order_T) - block_T


def _sort(key_X: np.ndarray) -> np.ndarray:
    """A stable argsort of small keys, quicker in few bits."""
    is_short = not len(key_X) or key_X.max() < 2**15
    return key_X.astype(np.int16 if is_short else np.int64).argsort(kind="stable")


def _places(order_X: np.ndarray, count_G: np.ndarray) -> np.ndarray:
    """The place of each target within its group, from 0, where ``order_X`` lists the targets group by group."""
    place_X = np.empty_like(order_X)
    place_X[order_X] = np.arange(len(order_X)) - np.repeat(count_G.cumsum() - count_G, count_G)
    return place_X


def keep_best_targets(score_RS: Tensor, is_target_RS: Tensor, num_keep_R: Tensor) -> Tensor:
    """Mark the ``num_keep_R`` best-scored targets of each row, each row one group; bool [R, S]."""
    row_X = torch.where(is_target_RS)[0]
    kept_RS = torch.zeros_like(is_target_RS)
    kept_RS[is_target_RS] = rank_targets(score_RS[is_target_RS], row_X, row_X, num_keep_R) < num_keep_R[row_X]
    return kept_RS


def read_by_targets(is_target_RS: Tensor, sample_RS: Tensor | None = None) -> Tensor:
    """Mark the positions up to the last target of each row, or of each sample of packed rows; bool [R, S].

    Under causal attention no loss depends on what follows, nor any gradient: leaving it out changes neither.
    """
    if sample_RS is None:
        return is_target_RS.flip(1).cumsum(dim=1).flip(1) > 0
    position_RS = torch.arange(is_target_RS.shape[1]).expand_as(is_target_RS)
    last_N = torch.full((int(sample_RS.max()) + 1,), -1)
    last_N.scatter_reduce_(0, sample_RS[is_target_RS], position_RS[is_target_RS], "amax")
    return position_RS <= last_N[sample_RS]


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
    rows = [kept_S.nonzero()[0] for kept_S in kept_RS.numpy()]
    num_kept = [len(kept_K) for kept_K in rows]
    if max(num_kept) > length:
        raise ValueError(f"a row keeps {max(num_kept)} positions, more than the length {length}")
    keep_idx_RK = np.zeros((len(rows), length), np.int64)
    for row, kept_K in enumerate(rows):
        keep_idx_RK[row, : len(kept_K)] = kept_K
    return torch.from_numpy(keep_idx_RK), torch.from_numpy(np.array(num_kept))
