"""From scores and lengths to kept candidates. Torch and numpy; every function gives the same on every rank, exactly.

**The rule.** A row that keeps k candidates of one sort keeps the best-scored set of k that holds the floor of each of
its groups: the floor's best of each group, then the best of all others. *It is optimal*: where an allowed set lacks one
of a group's best, swapping it in for a lower one of the group loses nothing and keeps every floor, so some best set
holds the floor's best of each group; the other places are free, and best filled with the best of what remains. (The
bases of a partition matroid with lower bounds.) Ties go to the lower position; NaN is −inf.

**Several sorts** have scores that cannot be compared. After the floors a row takes the best of each sort by turns, so
that every sort has gone the same share of its way from floor to ask, and beyond that the same share of its way from ask
to all; ties go to the sort named first.

How many candidates each row keeps is decided before: by counts in ``uniform`` and ``per-sample`` (:mod:`.budget`), by
scores in ``balanced`` (:mod:`.balance`).

Shapes: R rows, G groups, X candidates; see :mod:`.candidates`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regate_megatron.method import balance, budget
from regate_megatron.method.budget import Alignment, AllGather
from regate_megatron.method.candidates import Candidates


@dataclass(frozen=True)
class Selection:
    """What a rank runs.

    Attributes:
        length_M: positions each row of a microbatch runs, fill included; int64.
        is_kept_X: which candidates are kept; bool.
        achievable: least max/mean over ranks that any totals could have; ``balanced`` only, else None.
    """

    length_M: Tensor
    is_kept_X: Tensor
    achievable: float | None = None


@dataclass(frozen=True)
class Ranking:
    """The order in which rows keep candidates.

    Attributes:
        rank_X: the place of each candidate in its row's order, from 0; int64.
        worth_X: what keeping it is worth beside candidates of other rows, never rising along a row's order beyond the
            floors; float64.
    """

    rank_X: Tensor
    worth_X: Tensor


def select(candidates: Candidates, *, kind: str, alignment: Alignment, all_gather: AllGather) -> Selection:
    """Lengths and kept candidates of this rank's rows.

    Called by the planner of every data-parallel replica; ``uniform`` and ``balanced`` communicate over all of them,
    once.

    Args:
        kind: "uniform", "balanced" or "per-sample"; "dealt" is "per-sample" of rows that were dealt before.
        alignment: what lengths are a multiple of.
        all_gather: see :data:`~regate_megatron.method.budget.AllGather`.
    """
    if kind in ("per-sample", "dealt"):
        length_M, num_keep_R = budget.per_sample_lengths(candidates, alignment)
        return Selection(length_M, keep_best(candidates, candidates.ask_G, num_keep_R))
    if kind == "uniform":
        length_M, num_keep_R = budget.uniform_lengths(candidates, alignment, all_gather)
        return Selection(length_M, keep_best(candidates, candidates.floor_G, num_keep_R))
    ranking = rank_candidates(candidates, candidates.floor_G)
    span = balance.span_of(candidates, alignment)
    total, achievable = balance.agree_on_total(candidates, span, all_gather)
    length_M = balance.spread_total(total, span, candidates, ranking.rank_X, ranking.worth_X)
    num_keep_R = length_M.repeat_interleave(candidates.rows) - candidates.always_R
    return Selection(length_M, ranking.rank_X < num_keep_R.index_select(0, candidates.row_X), achievable)


def keep_best(candidates: Candidates, first_G: Tensor, num_keep_R: Tensor) -> Tensor:
    """Which candidates stay where each row keeps so many, the first in :func:`rank_candidates`; bool [X].

    Nothing is put in order where a row has one group of each sort: the best of each are above a threshold.

    Args:
        first_G: how many of each group come before all others; a row keeps no fewer.
    """
    kind_G, num_Y = candidates.kind_G, num_keep_R
    if len(candidates.sorts) > 1:
        counts = map(candidates.sum_by_kind, (first_G, candidates.ask_G, candidates.count_G))
        num_Y = torch.from_numpy(share_out(*counts, num_keep_R.numpy()).reshape(-1))
    if bool((kind_G.diff() > 0).all()):
        return _best_of_each(candidates.score_X, candidates.count_G, num_Y[kind_G])
    kind_X = kind_G.repeat_interleave(candidates.count_G)
    return rank_targets(candidates.score_X, kind_X, candidates.group_X, first_G) < num_Y[kind_X]


def share_out(first_RZ: np.ndarray, ask_RZ: np.ndarray, all_RZ: np.ndarray, num_keep_R: np.ndarray) -> np.ndarray:
    """How many of each of Z sorts stay in rows that keep so many, by the module's rule for several sorts; int64 [R, Z].

    Args:
        first_RZ, ask_RZ, all_RZ: floor, ask and number of candidates of each sort, int64; the sums of the first are no
            more than ``num_keep_R``.
    """
    to_ask_RZ, to_all_RZ = ask_RZ - first_RZ, all_RZ - ask_RZ
    left_R1, asked_R1 = (num_keep_R - first_RZ.sum(axis=1))[:, None], to_ask_RZ.sum(axis=1, keepdims=True)
    share_R1 = np.minimum(left_R1 / np.maximum(asked_R1, 1), 1)
    beyond_R1 = (left_R1 - asked_R1).clip(0) / np.maximum(to_all_RZ.sum(axis=1, keepdims=True), 1)
    # A sort that has gone this share of its way has taken as many, or one less: the rest is taken one by one.
    taken_RZ = ((share_R1 * to_ask_RZ).astype(np.int64) + (beyond_R1 * to_all_RZ).astype(np.int64) - 1).clip(0)
    while (rows_R := taken_RZ.sum(axis=1) < np.minimum(left_R1[:, 0], (all_RZ - first_RZ).sum(axis=1))).any():
        way_RZ = _way(taken_RZ + 1, to_ask_RZ, to_all_RZ)
        way_RZ[taken_RZ == all_RZ - first_RZ] = np.inf
        taken_RZ[rows_R, way_RZ.argmin(axis=1)[rows_R]] += 1
    return first_RZ + taken_RZ


def _way(number_X: np.ndarray, to_ask_X: np.ndarray, to_all_X: np.ndarray) -> np.ndarray:
    """How far a sort has gone with its ``number``-th candidate after the floor: 1 at its ask, 2 with all of them."""
    to_ask = number_X.clip(0) / np.maximum(to_ask_X, 1)
    return np.where(number_X <= to_ask_X, to_ask, 1 + (number_X - to_ask_X) / np.maximum(to_all_X, 1))


def _best_of_each(score_X: Tensor, count_G: Tensor, num_keep_G: Tensor) -> Tensor:
    """Mark the best-scored of each group, ties by position; bool [X]."""
    kept_X, end = np.zeros(len(score_X), bool), 0
    for count, num_keep in zip(count_G.tolist(), num_keep_G.tolist(), strict=True):
        own, end = slice(end, end + count), end + count
        if num_keep >= count:
            kept_X[own] = True
        elif num_keep > 0:
            key_T, kept_T = _descending(score_X.numpy()[own]), kept_X[own]
            worst = np.partition(key_T, num_keep - 1)[num_keep - 1]
            np.less(key_T, worst, out=kept_T)
            equal = (key_T == worst).nonzero()[0]
            kept_T[equal[: num_keep - np.count_nonzero(kept_T)]] = True
    return torch.from_numpy(kept_X)


def rank_candidates(candidates: Candidates, first_G: Tensor) -> Ranking:
    """The order in which each row keeps its candidates: the best ``first_G`` of each group come first, then others."""
    score_X, row_X, group_X = candidates.score_X, candidates.row_X, candidates.group_X
    if len(candidates.sorts) == 1:
        return Ranking(rank_targets(score_X, row_X, group_X, first_G), score_X)
    all_RZ = candidates.sum_by_kind(candidates.count_G)
    first_Y, ask_Y = (candidates.sum_by_kind(value_G).reshape(-1) for value_G in (first_G, candidates.ask_G))
    all_Y = all_RZ.reshape(-1)
    # From floor to ask and from there to all, the best first; those before the floor have gone no way. A slot is a
    # place in a kind's order, which counts alone say all of.
    start_Y = all_Y.cumsum() - all_Y
    number_X = np.arange(1, all_Y.sum() + 1) - np.repeat(start_Y + first_Y, all_Y)
    way_X = _way(number_X, np.repeat(ask_Y - first_Y, all_Y), np.repeat(all_Y - ask_Y, all_Y))
    rank_X, end = np.empty_like(number_X), 0
    for count in all_RZ.sum(axis=1).tolist():
        own, end = slice(end, end + count), end + count
        rank_X[own][way_X[own].argsort(kind="stable")] = np.arange(count)  # a row is a few rising runs
    kind_X = candidates.kind_G.repeat_interleave(candidates.count_G)
    slot_X = rank_targets(score_X, kind_X, group_X, first_G).numpy() + start_Y[kind_X.numpy()]
    return Ranking(torch.from_numpy(rank_X[slot_X]), torch.from_numpy(-way_X[slot_X]))


def rank_targets(score_X: Tensor, row_X: Tensor, group_X: Tensor, floor_G: Tensor) -> Tensor:
    """The place of each candidate of one sort in the order in which its row keeps them, from 0; int64 [X].

    The floor's best of each group come first, then the others; both by score, ties by position.

    Args:
        row_X, group_X: row and group of each candidate, int64, ascending.
        floor_G: how many of each group come first, int64.
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
    key_T = _descending(score_T)
    order_T = key_T.argsort()  # three times as fast as a stable sort; what that would do more follows
    sorted_T = key_T[order_T]
    is_next_T = sorted_T[1:] != sorted_T[:-1]
    if is_next_T.all():
        return order_T
    block_T = np.concatenate([[0], is_next_T.cumsum()]) * len(order_T)  # equal scores are one block
    return np.sort(block_T + order_T) - block_T


def _descending(score_X: np.ndarray) -> np.ndarray:
    """A key that is smaller the better the score; NaN counts as minus infinity."""
    return np.where(np.isnan(score_X), np.inf, -score_X)


def _sort(key_X: np.ndarray) -> np.ndarray:
    """A stable argsort of small keys, quicker in few bits."""
    is_short = not len(key_X) or key_X.max() < 2**15
    return key_X.astype(np.int16 if is_short else np.int64).argsort(kind="stable")


def _places(order_X: np.ndarray, count_G: np.ndarray) -> np.ndarray:
    """The place of each candidate within its group, from 0, where ``order_X`` lists them group by group."""
    place_X = np.empty_like(order_X)
    place_X[order_X] = np.arange(len(order_X)) - np.repeat(count_G.cumsum() - count_G, count_G)
    return place_X
