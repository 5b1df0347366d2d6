"""Counts of what ran, and the log line.

Every number counts the same everywhere: *targets* are positions with loss; *visual* positions hold a part of an image
or clip; *kept* are those that ran in a step; *positions* are what a row runs after the first dense layers, fill
included; *dense-equivalent* is the share of decoder layer-positions that ran, dense layers included, against running
every position in every layer; *max/mean* compares the positions that data-parallel ranks ran in sparse steps, step by
step: every step waits for the slowest rank. Fill is never kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_megatron.config import flag
from regate_megatron.method.plan import StepPlan
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.step import Step


def _most() -> Any:
    """A count that is not summed over ranks: the largest is taken."""
    return dataclasses.field(default=0, metadata={"over_ranks": "max"})


@dataclass
class Counters:
    """Sums over steps (and, once reduced, over data-parallel ranks)."""

    steps: int = _most()
    sparse_steps: int = _most()
    fallback_steps: int = _most()
    targets_total: int = 0
    targets_kept: int = 0
    visual_total: int = 0
    visual_kept: int = 0
    positions_dense: int = 0
    positions_run: int = 0
    layer_positions_dense: int = 0
    layer_positions_run: int = 0
    sparse_positions: int = 0  # that this rank ran in sparse steps,
    sparse_positions_slowest: int = 0  # that the slowest rank of each step ran,
    sparse_positions_achievable: int = 0  # that it would have run at the least max/mean that the step's rows allow
    sparse_positions_dense: int = 0  # that the slowest rank would have run in each of them had it been dense
    layer_squares_dense: int = 0
    layer_squares_run: int = 0
    targets_scored: int = 0  # by the student's own losses; of them
    targets_known: int = 0  # those with a difficulty of their own, not the prior's
    visual_scored: int = 0  # visual positions, by the gradient that reached them; of them
    visual_known: int = 0  # those where a dense step has shown it
    references_asked: int = 0  # samples whose reference losses were wanted; of them
    references_found: int = 0  # those that the teacher did not have to compute
    planning_us: int = _most()
    teacher_us: int = _most()

    def add(self, other: Counters) -> None:
        """Add ``other`` to this."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def add_lengths(self, rows: int, dense: int, length: int, num_layers: int, short_layers: int) -> None:
        """Count ``rows`` rows or segments: the last ``short_layers`` of ``num_layers`` ran ``length`` positions.

        Squares are what attention's work grows with.
        """
        long_layers = num_layers - short_layers
        self.positions_dense += rows * dense
        self.positions_run += rows * length
        self.layer_positions_dense += rows * dense * num_layers
        self.layer_positions_run += rows * (dense * long_layers + length * short_layers)
        self.layer_squares_dense += rows * dense**2 * num_layers
        self.layer_squares_run += rows * (dense**2 * long_layers + length**2 * short_layers)

    def to_tensor(self) -> Tensor:
        """All counts, int64."""
        return torch.tensor([getattr(self, field.name) for field in dataclasses.fields(self)])

    @classmethod
    def from_tensor(cls, values: Tensor) -> Counters:
        """The inverse of :meth:`to_tensor`."""
        return cls(*values.tolist())


def count_step(step: Step, *, num_layers: int, dense_layers: int) -> Counters:
    """Count one step of one data-parallel rank, on its planner; times are added later."""
    plan, balance = step.plan, step.balance
    counters = Counters(steps=1, sparse_steps=int(plan.is_sparse), fallback_steps=int(step.fallback))
    if balance is not None:
        counters.sparse_positions, counters.sparse_positions_slowest = balance.own, balance.slowest
        counters.sparse_positions_achievable = round((balance.achievable or 0) * balance.mean)
        counters.sparse_positions_dense = balance.dense_slowest
    counters.references_asked, counters.references_found = step.num_asked, step.num_found
    for is_known_X in step.is_known or ():
        counters.targets_scored += len(is_known_X)
        counters.targets_known += int(is_known_X.sum())
    if step.is_visual_known is not None:
        counters.visual_scored = len(step.is_visual_known)
        counters.visual_known = int(step.is_visual_known.sum())
    facts = step.whole
    of_targets_P, of_visual_P = facts.is_target_P, facts.is_visual_P
    counters.targets_total, counters.visual_total = int(of_targets_P.sum()), int(of_visual_P.sum())
    if plan.is_sparse:
        of_targets_P, of_visual_P = of_targets_P & plan.kept_P, of_visual_P & plan.kept_P
    counters.targets_kept, counters.visual_kept = int(of_targets_P.sum()), int(of_visual_P.sum())
    if not plan.is_sparse:
        for one in facts.microbatches:
            if one.sample_BS is None:
                rows, dense = one.is_target_BS.shape
                counters.add_lengths(rows, dense, dense, num_layers, 0)
                continue
            for dense in one.segment_length_N.tolist():
                counters.add_lengths(1, dense, dense, num_layers, 0)
    counters.add(count_plan(plan, num_layers=num_layers, dense_layers=dense_layers))
    return counters


def count_plan(plan: StepPlan, *, num_layers: int, dense_layers: int) -> Counters:
    """The lengths alone of a step, from its plan, which every rank has; all zero for a dense step."""
    counters = Counters()
    short_layers = num_layers - dense_layers
    for one in plan.microbatches if plan.is_sparse else ():
        if one.packing is None:
            counters.add_lengths(len(one.keep_idx_BK), one.dense_length, one.length, num_layers, short_layers)
            continue
        for dense, length in zip(one.packing.dense_length_N.tolist(), one.packing.length_N.tolist(), strict=True):
            counters.add_lengths(1, dense, length, num_layers, short_layers)
    return counters


def reduce_counters(counters: Counters, topology: Topology) -> Counters:
    """Sum over data-parallel ranks, known on every rank afterwards; all ranks call this, at log intervals.

    Steps and times are of one rank: steps agree, times are the slowest planner's.
    """
    values = torch.zeros_like(counters.to_tensor())
    if topology.is_planner:
        own = counters.to_tensor()
        values = topology.all_reduce_planners(own, "sum")
        most = topology.all_reduce_planners(own, "max")
        for index, field in enumerate(dataclasses.fields(Counters)):
            if field.metadata.get("over_ranks") == "max":
                values[index] = most[index]
    if topology.replica_size > 1:
        torch.distributed.broadcast(values, topology.planner_rank, group=topology.replica_group)
    return Counters.from_tensor(values)


def ratios(counters: Counters) -> dict[str, float]:
    """What the log line, TensorBoard and W&B show, under ``regate/``; of visual positions only where there are any."""
    steps = max(counters.steps, 1)
    visual = {"regate/visual-kept": counters.visual_kept / counters.visual_total} if counters.visual_total else {}
    if counters.visual_scored:
        visual["regate/visual-with-history"] = counters.visual_known / counters.visual_scored
    return {
        "regate/targets-kept": counters.targets_kept / max(counters.targets_total, 1),
        **visual,
        "regate/positions-run": counters.positions_run / max(counters.positions_dense, 1),
        "regate/dense-equivalent": counters.layer_positions_run / max(counters.layer_positions_dense, 1),
        "regate/max-mean-positions": counters.sparse_positions_slowest / counters.sparse_positions
        if counters.sparse_positions
        else 1.0,
        "regate/targets-with-history": counters.targets_known / max(counters.targets_scored, 1),
        "regate/references-found": counters.references_found / max(counters.references_asked, 1),
        "regate/sparse-steps": counters.sparse_steps / steps,
        "regate/fallback-steps": float(counters.fallback_steps),
        "regate/planning-ms-per-step": counters.planning_us / 1000 / steps,
        "regate/teacher-ms-per-step": counters.teacher_us / 1000 / steps,
    }


def log_line(iteration: int, phase: str, interval: Counters, total: Counters, *, flops: float | None = None) -> str:
    """One line for one log interval; ``flops``: the share of dense FLOPs that ran, where the framework counts them."""
    share = ratios(interval)
    fallback = (
        f" | {interval.fallback_steps} steps ran dense (a score was not finite)" if interval.fallback_steps else ""
    )
    work = "" if flops is None else f" | FLOPs {flops:.1%} of dense"
    visual = ""
    if interval.visual_total:
        visual = f" | visual kept {interval.visual_kept}/{interval.visual_total} ({share['regate/visual-kept']:.1%})"
    return (
        f"[regate] iteration {iteration} | {phase} ({interval.sparse_steps}/{interval.steps} steps sparse)"
        f" | targets kept {interval.targets_kept}/{interval.targets_total} ({share['regate/targets-kept']:.1%})"
        f"{visual}"
        f" | positions run {interval.positions_run}/{interval.positions_dense} ({share['regate/positions-run']:.1%})"
        f" | dense-equivalent {share['regate/dense-equivalent']:.1%}"
        f" (all steps {ratios(total)['regate/dense-equivalent']:.1%})"
        f"{work}{_balance(interval)}{_history(interval)}"
        f" | per step: planning {share['regate/planning-ms-per-step']:.1f} ms,"
        f" teacher {share['regate/teacher-ms-per-step']:.1f} ms"
        f"{fallback}"
    )


def has_history(counters: Counters) -> bool:
    """Whether more than one in a hundred of the scored targets has a difficulty of its own."""
    return 100 * counters.targets_known >= counters.targets_scored


def no_history(interval: Counters) -> str:
    """The line for a run whose samples never come back."""
    return (
        f"[regate] only {interval.targets_known / interval.targets_scored:.1%} of the targets have a history: no sample"
        " comes back as it was, so the score knows tokens, not samples. In a first epoch that is so. In a later one the"
        " data change: windows cut anew (GPTDataset cuts others every epoch) or augmented pictures. Then take"
        f" {flag('score')} reference, a dataset that keeps its samples, or {flag('sample_key')} text"
    )


def _history(interval: Counters) -> str:
    """How much of what the scores need was known already."""
    share, text = ratios(interval), ""
    if interval.targets_scored:
        text += f" | targets with history {share['regate/targets-with-history']:.1%}"
    if interval.visual_scored:
        text += f" | visual positions with history {share['regate/visual-with-history']:.1%}"
    if interval.references_asked:
        text += f" | reference losses found {share['regate/references-found']:.1%}"
    return text


def _balance(interval: Counters) -> str:
    """max/mean positions over data-parallel ranks, and beside it the least that this data allows, if above 1.02."""
    if not interval.sparse_positions:
        return ""
    text = f" | max/mean over ranks {ratios(interval)['regate/max-mean-positions']:.3f}"
    achievable = interval.sparse_positions_achievable / interval.sparse_positions
    return text + (f" (at best {achievable:.3f})" if achievable > 1.02 else "")
