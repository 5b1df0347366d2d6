"""Per-token losses that the loss hooks saw, put together for the planner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.decoder.cutting import places
from regate_megatron.decoder.exchange import Layout


def gather_context(losses: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Per-token losses of all context ranks, one flat tensor per rank; the context group's ranks call this."""
    own = torch.cat([loss_BS.float().reshape(-1) for loss_BS in losses])
    parts = [torch.empty_like(own) for _ in range(layout.cp_size)]
    dist.all_gather(parts, own, group=layout.context_group)
    return parts


def to_host(parts: Sequence[Tensor], facts: Sequence[MicrobatchFacts]) -> list[Tensor]:
    """Per-token losses of all microbatches on the CPU, in one copy; float32 [B, S] each.

    Args:
        parts: what :func:`gather_context` gives; or, without context parallelism, one [B, S] per microbatch.
    """
    if all(part.dim() == 2 for part in parts):
        parts = [torch.cat([loss_BS.float().reshape(-1) for loss_BS in parts])]
    host_RX = torch.stack(list(parts)).cpu()
    losses, at = [], 0
    for one in facts:
        rows, length = one.is_target_BS.shape
        if len(host_RX) == 1:
            losses.append(host_RX[0, at : at + rows * length].view(rows, length))
            at += rows * length
            continue
        dense = places(one.segment_length_N, cp_size=len(host_RX))
        size = rows * dense.local_length
        piece_RBL = host_RX[:, at : at + size].view(len(host_RX), rows, dense.local_length)
        losses.append(piece_RBL[dense.rank_L, :, dense.index_L].t().contiguous())
        at += size
    return losses
