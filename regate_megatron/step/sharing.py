"""How a plan reaches every rank of a data-parallel replica, and how they make sure that they have the same one.

The planner broadcasts it on the host (gloo), so that no accelerator stream waits for it; the ranks compare its hash
before the schedule starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from regate_megatron.errors import refuse
from regate_megatron.method.plan import StepPlan
from regate_megatron.ranks.topology import Topology


def share_plan(plan: StepPlan | None, topology: Topology) -> StepPlan:
    """Give the planner's plan to every rank of its replica; all of its ranks call this, over the replica's gloo group.

    Args:
        plan: the plan on the planner; elsewhere it is not looked at.

    Raises:
        ReGateError: the plans differ after the exchange; on every rank of the replica.
    """
    if topology.replica_size == 1:
        return plan
    flat = topology.broadcast_from_planner(plan.pack() if topology.is_planner else None)
    if not topology.is_planner:
        plan = StepPlan.unpack(flat)
    verify_plan(plan, topology)
    return plan


def share_loss_masks(pulled: Sequence[dict] | None, plan: StepPlan, topology: Topology) -> list[Tensor]:
    """Give the loss masks of the planner's batches to every rank of its replica; all of its ranks call this.

    Args:
        pulled: the planner's microbatches, before anything is left out of them; elsewhere they are not looked at.
        plan: what they run.

    Returns:
        float64 [B, S] of each, on the host; nothing in a dense step.
    """
    if not plan.is_sparse:
        return []
    flat = None
    if topology.is_planner:
        flat = torch.cat([batch["loss_mask"].cpu().reshape(-1) for batch in pulled]).double().view(torch.int64)
    mask_P = topology.broadcast_from_planner(flat, plan.kept_P.numel()).view(torch.float64)
    sizes = [one.kept_mask().numel() for one in plan.microbatches]
    return [part.view_as(one.kept_mask()) for part, one in zip(mask_P.split(sizes), plan.microbatches, strict=True)]


def verify_plan(plan: StepPlan, topology: Topology) -> None:
    """Compare the plan's hash over the replica's ranks; all of them call this, over the replica's gloo group.

    Raises:
        ReGateError: the hashes differ; on every rank of the replica.
    """
    digest = plan.digest()
    words_2 = torch.from_numpy(np.frombuffer(xxhash.xxh3_128(digest.encode()).digest(), dtype=np.int64).copy())
    # the least, and minus the largest, in one message
    extremes_4 = topology.all_reduce_replica(torch.cat([words_2, -words_2]), "min")
    if torch.equal(extremes_4[:2], -extremes_4[2:]):
        return
    reports: list = [None] * topology.replica_size
    dist.all_gather_object(reports, (dist.get_rank(), digest), group=topology.replica_group)
    hashes = ", ".join(f"rank {rank}: {value[:8]}" for rank, value in reports)
    raise refuse(
        "step plan",
        given=f"different plans on one replica ({hashes})",
        allowed="one plan per replica",
        change="nothing in the settings, this is a fault of a rank: restart from the last checkpoint",
    )
