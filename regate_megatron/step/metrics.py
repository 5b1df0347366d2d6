"""Counts of what ran, the log line, and the trace.

Every number counts the same everywhere: *targets* are positions with loss; *kept* are targets that ran in a step;
*positions* are what a row runs after the first dense layers, fill included; *dense-equivalent* is the share of decoder
layer-positions that ran, dense layers included, against running every position in every layer; *max/mean* compares
the positions that data-parallel ranks ran in sparse steps, step by step: every step waits for the slowest rank. Fill is
never kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.batches.facts import key_hex
from regate_megatron.config import flag
from regate_megatron.errors import refuse
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.plan import StepPlan


@dataclass(frozen=True)
class Balance:
    """Positions that data-parallel ranks run in one sparse step, alignment and fill included.

    Attributes:
        slowest, own, mean: of the rank that runs most, of this rank, of all ranks.
        achievable: the least max/mean that contexts and row lengths allow; None where the budget does not balance.
    """

    slowest: int
    own: int
    mean: float
    achievable: float | None = None


@dataclass
class Counters:
    """Sums over steps (and, once reduced, over data-parallel ranks)."""

    steps: int = 0
    sparse_steps: int = 0
    fallback_steps: int = 0
    targets_total: int = 0
    targets_kept: int = 0
    positions_dense: int = 0
    positions_run: int = 0
    layer_positions_dense: int = 0
    layer_positions_run: int = 0
    sparse_positions: int = 0  # run in sparse steps: by this rank,
    sparse_positions_slowest: int = 0  # by the slowest rank of each step,
    sparse_positions_achievable: int = 0  # and by it, had the step the least max/mean that it allows
    layer_squares_dense: int = 0
    layer_squares_run: int = 0
    planning_ms: int = 0
    teacher_ms: int = 0

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


def count_step(
    facts: Sequence[MicrobatchFacts],
    plan: StepPlan,
    *,
    num_layers: int,
    dense_layers: int,
    fallback: bool,
    balance: Balance | None = None,
) -> Counters:
    """Count one step of one data-parallel rank; ``balance`` is known in sparse steps."""
    counters = Counters(steps=1, sparse_steps=int(plan.is_sparse), fallback_steps=int(fallback))
    if balance is not None:
        counters.sparse_positions, counters.sparse_positions_slowest = balance.own, balance.slowest
        counters.sparse_positions_achievable = round((balance.achievable or 0) * balance.mean)
    for index, one in enumerate(facts):
        targets = kept = int(one.is_target_BS.sum())
        if plan.is_sparse:
            kept = int((plan.microbatches[index].kept_mask() & one.is_target_BS).sum())
        elif one.sample_BS is None:
            rows, dense = one.is_target_BS.shape
            counters.add_lengths(rows, dense, dense, num_layers, 0)
        else:
            for dense in one.segment_length_N.tolist():
                counters.add_lengths(1, dense, dense, num_layers, 0)
        counters.targets_total += targets
        counters.targets_kept += kept
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
            if field.name.endswith(("steps", "_ms")):
                values[index] = most[index]
    if topology.replica_size > 1:
        torch.distributed.broadcast(values, topology.planner_rank, group=topology.replica_group)
    return Counters.from_tensor(values)


def ratios(counters: Counters) -> dict[str, float]:
    """What the log line, TensorBoard and W&B show, under ``regate/``."""
    steps = max(counters.steps, 1)
    return {
        "regate/targets-kept": counters.targets_kept / max(counters.targets_total, 1),
        "regate/positions-run": counters.positions_run / max(counters.positions_dense, 1),
        "regate/dense-equivalent": counters.layer_positions_run / max(counters.layer_positions_dense, 1),
        "regate/max-mean-positions": counters.sparse_positions_slowest / counters.sparse_positions
        if counters.sparse_positions
        else 1.0,
        "regate/sparse-steps": counters.sparse_steps / steps,
        "regate/fallback-steps": float(counters.fallback_steps),
        "regate/planning-ms-per-step": counters.planning_ms / steps,
        "regate/teacher-ms-per-step": counters.teacher_ms / steps,
    }


def log_line(iteration: int, phase: str, interval: Counters, total: Counters, *, flops: float | None = None) -> str:
    """One line for one log interval; ``flops``: the share of dense FLOPs that ran, where the framework counts them."""
    share, steps = ratios(interval), max(interval.steps, 1)
    fallback = f" | {interval.fallback_steps} steps ran dense (non-finite)" if interval.fallback_steps else ""
    work = "" if flops is None else f" | FLOPs {flops:.1%} of dense"
    return (
        f"[regate] iteration {iteration} | {phase} ({interval.sparse_steps}/{interval.steps} steps sparse)"
        f" | targets kept {interval.targets_kept}/{interval.targets_total} ({share['regate/targets-kept']:.1%})"
        f" | positions run {interval.positions_run}/{interval.positions_dense} ({share['regate/positions-run']:.1%})"
        f" | dense-equivalent {share['regate/dense-equivalent']:.1%}"
        f" (all steps {ratios(total)['regate/dense-equivalent']:.1%})"
        f"{work}{_balance(interval)}"
        f" | per step: planning {interval.planning_ms / steps:.1f} ms, teacher {interval.teacher_ms / steps:.1f} ms"
        f"{fallback}"
    )


def _balance(interval: Counters) -> str:
    """max/mean positions over data-parallel ranks, and beside it what was achievable if that is not balanced either."""
    if not interval.sparse_positions:
        return ""
    text = f" | max/mean over ranks {ratios(interval)['regate/max-mean-positions']:.3f}"
    achievable = interval.sparse_positions_achievable / interval.sparse_positions
    return text + (f" (achievable {achievable:.3f})" if achievable > 1.02 else "")


def check_trace_folder(directory: str) -> None:
    """Make the folder of the trace, or refuse it.

    Raises:
        ReGateError: it cannot be made or written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        form = {"allowed": "a folder this process may write", "change": "the path"}
        raise refuse(flag("trace"), given=directory, **form)


class Trace:
    """``DIR/dp00000.jsonl``: one JSON object per microbatch of this data-parallel rank; planners only."""

    def __init__(self, directory: str, dp_rank: int) -> None:
        self._path = Path(directory) / f"dp{dp_rank:05d}.jsonl"
        self._file: TextIO | None = None
        self.continues = False

    def write(
        self,
        *,
        iteration: int,
        phase: str,
        fallback: bool,
        dp_rank: int,
        facts: Sequence[MicrobatchFacts],
        plan: StepPlan,
        scores: Sequence[Tensor] | None,
    ) -> None:
        """Write one step. Rows that only the layout joins are traced as in every other layout.

        Args:
            iteration: as Megatron prints it, from 1.
            scores: per microbatch float64 [X], one per target; None where nothing was scored (dense steps).
        """
        if self._file is None:  # opened late: a run from the start begins the file anew, a resumed one goes on in it
            self._file = self._path.open("a" if self.continues else "w", buffering=1)
        plan_hash = plan.digest()
        for index, one in enumerate(facts):
            rows = []
            real_BS = one.is_target_BS | one.is_context_BS
            microbatch = plan.microbatches[index] if plan.is_sparse else None
            joined = one.num_samples if one.joins_rows else 1
            kept_BS = microbatch.kept_mask() & real_BS if microbatch else real_BS
            values = iter(scores[index].tolist() if scores is not None else ())  # in the order of samples and positions
            for sample, row in enumerate(one.row_N.tolist()):
                own_S = True if one.sample_BS is None else one.sample_BS[row] == sample
                target_S, kept_S = one.is_target_BS[row] & own_S, kept_BS[row] & own_S
                start = int(one.start_N[sample]) if one.joins_rows else 0
                positions = (torch.where(target_S)[0] - start).tolist()
                rows.append(
                    {
                        "sample_key": key_hex(one.difficulty_key_N2[sample]),
                        "num_context": int((one.is_context_BS[row] & own_S).sum()),
                        "num_targets": len(positions),
                        "num_kept_targets": int((kept_S & target_S).sum()),
                        "kept": (torch.where(kept_S)[0] - start).tolist(),
                        "scores": {
                            str(position): value if math.isfinite(value) else None  # JSON knows no NaN
                            for position, value in zip(positions, values, strict=False)
                        },
                    }
                )
            record: dict[str, Any] = {
                "iteration": iteration,
                "phase": phase,
                "fallback": fallback,
                "dp_rank": dp_rank,
                "microbatch": index,
                "dense_length": one.planned_length,
                "kept_length": microbatch.length // joined if microbatch else one.planned_length,
                "plan_hash": plan_hash,
                "rows": rows,
            }
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
