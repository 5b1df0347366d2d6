"""Who plans for whom: the planner of each data-parallel replica, and the host-side groups they talk over.

No group of Megatron spans TP × PP × CP, and its device groups would make streams wait for host decisions; so gloo
groups are made here: one per replica, one over all planners, and one over all ranks.

How ranks fail together is in :mod:`.together`: every exchange below first learns whether a rank has failed, so that
none waits for one that has left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.errors import refuse
from regate_megatron.ranks.together import Together


@dataclass(frozen=True)
class Topology:
    """This rank's place. Built by :func:`build_topology` on all ranks.

    Attributes:
        dp_rank, dp_size: the data-parallel replica this rank belongs to, and their number.
        is_planner: last pipeline stage, tensor rank 0, context rank 0 of the replica.
        planner_rank: global rank of this replica's planner.
        replica_size: ranks per replica.
        replica_group: gloo group of this replica's ranks.
        planner_group: gloo group of all planners; only they use it.
        world_group: gloo group of all ranks.
        sees_losses: last pipeline stage, tensor rank 0: the planner and the other context ranks beside it.
        places: per tensor, pipeline and context rank the global ranks of all replicas, in order of replicas.
        together: how all ranks end a stage, or fail in it; see :class:`~regate_megatron.ranks.together.Together`.
    """

    dp_rank: int
    dp_size: int
    is_planner: bool
    planner_rank: int
    replica_size: int
    replica_group: Any
    planner_group: Any
    world_group: Any
    sees_losses: bool = True
    places: tuple[tuple[int, ...], ...] = ()
    together: Together = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "together", Together(self))

    def close(self) -> None:
        """Give the groups back, once no rank has anything more to say over them. Any rank, no communication."""
        for group in (self.planner_group, self.replica_group, self.world_group):
            dist.destroy_process_group(group)  # of others' groups a rank holds no more than a name

    def all_reduce_planners(self, values: Tensor, op: str) -> Tensor:
        """Reduce a CPU tensor over the planners ("sum" or "max"); planners only."""
        if self.dp_size > 1:
            self.together.meet_planners()
            values = values.clone()
            dist.all_reduce(values, getattr(dist.ReduceOp, op.upper()), group=self.planner_group)
        return values

    def all_gather_planners(self, values: Tensor) -> Tensor:
        """Stack a CPU vector of every planner, in order of replicas; [k] -> [D, k]; planners only."""
        gathered_Dk = values.new_empty(self.dp_size, len(values))
        if self.dp_size == 1:
            return gathered_Dk.copy_(values)
        self.together.meet_planners()
        dist.all_gather(list(gathered_Dk), values, group=self.planner_group)
        return gathered_Dk

    def exchange_planners(
        self, values_Xx: Tensor, send_D: Tensor, receive_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give every planner its part of CPU values, in order of planners; all planners call this.

        Args:
            values_Xx: what this planner sends, one part after the other, [X, ...].
            send_D: how many values go to each planner, int64.
            receive_D: how many come from each; None: one more small exchange finds out.

        Returns:
            what came, one part after the other, and how much from each.
        """
        if self.dp_size == 1:
            return values_Xx, send_D
        self.together.meet_planners()
        if receive_D is None:
            receive_D = torch.empty_like(send_D)
            dist.all_to_all_single(receive_D, send_D, group=self.planner_group)
        received_Xx = values_Xx.new_empty(int(receive_D.sum()), *values_Xx.shape[1:])
        sizes = receive_D.tolist(), send_D.tolist()
        dist.all_to_all_single(received_Xx, values_Xx.contiguous(), *sizes, group=self.planner_group)
        return received_Xx, receive_D

    def all_reduce_replica(self, values: Tensor, op: str) -> Tensor:
        """Reduce a CPU tensor over this replica's ranks ("min" or "max"); all of them call this."""
        if self.replica_size > 1:
            self.together.meet_replica()
            values = values.clone()
            dist.all_reduce(values, getattr(dist.ReduceOp, op.upper()), group=self.replica_group)
        return values

    def gather_at_planner(self, values: Tensor) -> list[Tensor] | None:
        """Give the planner the CPU vectors of its replica's ranks, as long as they are; all of them call this.

        Returns:
            them, in order of ranks, on the planner; None elsewhere.
        """
        if self.replica_size == 1:
            return [values]
        most = int(self.all_reduce_replica(torch.tensor([len(values)]), "max"))
        padded = torch.cat([torch.tensor([len(values)]).to(values), values, values.new_zeros(most - len(values))])
        parts = [torch.empty_like(padded) for _ in range(self.replica_size)] if self.is_planner else None
        dist.gather(padded, parts, dst=self.planner_rank, group=self.replica_group)
        return [part[1 : 1 + int(part[0])] for part in parts] if self.is_planner else None

    def broadcast_from_planner(self, flat: Tensor | None, length: int | None = None) -> Tensor | None:
        """Give the planner's int64 vector, of any length, to all ranks of its replica; all of them call this.

        Args:
            flat: on the planner the vector, or None where there is nothing to give; elsewhere it is not looked at.
            length: of the vector, where all ranks know it; else one more small message tells it.
        """
        if self.replica_size == 1:
            return flat
        self.together.meet_replica()
        if not self.is_planner:
            flat = None
        if length is None:
            size = torch.tensor([-1 if flat is None else flat.numel()])
            dist.broadcast(size, self.planner_rank, group=self.replica_group)
            length = int(size)
        if length < 0:
            return None
        if not self.is_planner:
            flat = torch.empty(length, dtype=torch.int64)
        dist.broadcast(flat, self.planner_rank, group=self.replica_group)
        return flat


def build_topology() -> Topology:
    """Read this rank's place from Megatron's parallel state and make the groups. All ranks call this, in step.

    Raises:
        ReGateError: there is no parallel state yet.
    """
    from megatron.core import parallel_state as mpu

    if not mpu.model_parallel_is_initialized():
        allowed = "the parallel state that initialize_model_parallel sets up"
        raise refuse(
            "attach", given="a process without parallel state", allowed=allowed, change="the order: that first"
        )
    last_stage = mpu.get_pipeline_model_parallel_rank() == mpu.get_pipeline_model_parallel_world_size() - 1
    sees_losses = last_stage and mpu.get_tensor_model_parallel_rank() == 0
    is_planner = sees_losses and mpu.get_context_parallel_rank() == 0
    dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    world_group = dist.new_group(backend="gloo")
    part = (
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_context_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
    )
    places: list = [None] * dist.get_world_size()
    dist.all_gather_object(places, (dp_rank, is_planner, part), group=world_group)
    planners = sorted((place, rank) for rank, (place, plans, _) in enumerate(places) if plans)
    assert [place for place, _ in planners] == list(range(dp_size)), f"one planner per replica, got {planners}"
    planner_ranks = [rank for _, rank in planners]
    # Every rank takes part in the making of every group: names of groups made by members alone clash where ranks
    # belong to different numbers of Megatron's groups.
    replicas = [[rank for rank, (place, *_) in enumerate(places) if place == one] for one in range(dp_size)]
    by_part: dict[tuple[int, ...], dict[int, int]] = {}
    for rank, (place, _, part) in enumerate(places):
        by_part.setdefault(part, {})[place] = rank
    replica_groups = [dist.new_group(ranks, backend="gloo") for ranks in replicas]
    planner_group = dist.new_group(planner_ranks, backend="gloo")
    return Topology(
        dp_rank=dp_rank,
        dp_size=dp_size,
        is_planner=is_planner,
        sees_losses=sees_losses,
        planner_rank=planner_ranks[dp_rank],
        replica_size=len(replicas[dp_rank]),
        replica_group=replica_groups[dp_rank],
        planner_group=planner_group,
        world_group=world_group,
        places=tuple(tuple(ranks[one] for one in range(dp_size)) for _, ranks in sorted(by_part.items())),
    )


def whole_world() -> Topology:
    """A place in which all ranks are one replica and rank 0 plans, for what is no matter of replicas. Any rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return Topology(
        dp_rank=0,
        dp_size=1,
        is_planner=rank == 0,
        planner_rank=0,
        replica_size=size,
        replica_group=None,
        planner_group=None,
        world_group=None,
        sees_losses=False,
    )
