"""The plan of one training step, and how it reaches every rank of a data-parallel replica.

One planner per replica (last pipeline stage, tensor rank 0, context rank 0) makes the plan. It is broadcast over the
replica's ranks on the host (gloo), so that no accelerator stream waits for it, and its hash is compared before the
schedule starts.

Shapes: B rows of a microbatch, S dense positions, K positions that run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from regate_megatron.errors import ReGateError
from regate_megatron.topology import Topology

_HEADER = 3  # per microbatch: B, S, K


@dataclass(frozen=True)
class MicrobatchPlan:
    """What one microbatch runs.

    Attributes:
        dense_length: S.
        keep_idx_BK: dense positions that run, ascending, fill (position 0) last; int64 [B, K]. None: the dense step.
        num_kept_B: how many leading slots of each row are real; int64 [B]. None: the dense step.
    """

    dense_length: int
    keep_idx_BK: Tensor | None = None
    num_kept_B: Tensor | None = None

    @property
    def length(self) -> int:
        """K, the positions each row runs after the dense layers."""
        return self.dense_length if self.keep_idx_BK is None else self.keep_idx_BK.shape[1]

    @property
    def is_kept_BK(self) -> Tensor:
        """Which slots are real, not fill; bool [B, K]."""
        return torch.arange(self.length, device=self.num_kept_B.device)[None, :] < self.num_kept_B[:, None]

    def kept_mask(self) -> Tensor:
        """Kept dense positions as a mask; bool [B, S]."""
        mask_BS = torch.zeros(len(self.num_kept_B), self.dense_length, dtype=torch.int64)
        return mask_BS.scatter_add_(1, self.keep_idx_BK, self.is_kept_BK.long()) > 0


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step: one :class:`MicrobatchPlan` per microbatch, in order; empty for a dense step."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Whether this step elides anything."""
        return bool(self.microbatches)

    def digest(self) -> str:
        """A 128-bit hash of everything in the plan, in hex."""
        digest = xxhash.xxh3_128(np.int64(self.step).tobytes())
        for flat in self._tensors():
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> list[Tensor]:
        flat = []
        for microbatch in self.microbatches:
            rows, length = microbatch.keep_idx_BK.shape
            flat += [
                torch.tensor([rows, microbatch.dense_length, length]),
                microbatch.num_kept_B,
                microbatch.keep_idx_BK.reshape(-1),
            ]
        return flat

    def pack(self) -> Tensor:
        """The plan as one int64 vector."""
        return torch.cat([torch.tensor([self.step, len(self.microbatches)]), *self._tensors()])

    @classmethod
    def unpack(cls, flat: Tensor) -> StepPlan:
        """The inverse of :meth:`pack`."""
        step, count = flat[:2].tolist()
        at, microbatches = 2, []
        for _ in range(count):
            rows, dense_length, length = flat[at : at + _HEADER].tolist()
            at += _HEADER
            num_kept_B, at = flat[at : at + rows], at + rows
            keep_idx_BK, at = flat[at : at + rows * length].view(rows, length), at + rows * length
            microbatches.append(MicrobatchPlan(dense_length, keep_idx_BK, num_kept_B))
        return cls(step, tuple(microbatches))


def share_plan(plan: StepPlan | None, topology: Topology, error: str | None = None) -> StepPlan:
    """Give the planner's plan to every rank of its replica; all of its ranks call this, over the replica's gloo group.

    Args:
        plan: the plan on the planner, None elsewhere.
        error: what went wrong on this rank before; raised on every rank of the replica.

    Raises:
        ReGateError: a rank reported an error, or the plans differ after the exchange.
    """
    if topology.replica_size == 1:
        if error:
            raise ReGateError(error)
        return plan
    flat = plan.pack() if plan is not None else torch.empty(0, dtype=torch.int64)
    size = torch.tensor([flat.numel()])
    dist.broadcast(size, topology.planner_rank, group=topology.replica_group)
    if not topology.is_planner:
        flat = torch.empty(int(size), dtype=torch.int64)
    dist.broadcast(flat, topology.planner_rank, group=topology.replica_group)
    plan = StepPlan.unpack(flat) if flat.numel() else None
    verify_plan(plan, topology, error)
    return plan


def verify_plan(plan: StepPlan | None, topology: Topology, error: str | None = None) -> None:
    """Compare the plan's hash over the replica's ranks; all of them call this, over the replica's gloo group.

    Raises:
        ReGateError: a rank reported an error, or the hashes differ; on every rank.
    """
    digest = plan.digest() if plan is not None else ""
    words = np.frombuffer(xxhash.xxh3_128((digest + (error or "")).encode()).digest(), dtype=np.int64).copy()
    mine = torch.from_numpy(words)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=topology.replica_group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=topology.replica_group)
    if torch.equal(low, high) and plan is not None:
        return
    reports: list = [None] * topology.replica_size
    dist.all_gather_object(reports, (dist.get_rank(), digest, error), group=topology.replica_group)
    failed = [text for _, _, text in reports if text]
    if failed:
        raise ReGateError(failed[0])
    hashes = ", ".join(f"rank {rank}: {value[:8] or 'none'}" for rank, value, _ in reports)
    raise ReGateError(
        f"regate: step plan: given different plans on one replica ({hashes}); allowed one plan per replica; "
        "change nothing in the settings, this is a fault of a rank: restart from the last checkpoint"
    )
