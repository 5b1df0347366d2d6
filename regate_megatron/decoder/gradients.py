"""How strongly the loss depends on each position where rows are shortened: the norm of the gradient, in dense steps.

The dense step runs as two ranges of layers, as the sparse one does, so that hidden states between them lie outside of
what recompute runs again; an autograd hook takes the norm on the device. Nothing waits for it within the schedule.

Shapes: L positions of this rank, B rows, H hidden, S positions of a row, R ranks that share a sequence, X entries of a
rank in a step, P positions of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.decoder.current import Watcher
from regate_megatron.decoder.cutting import places
from regate_megatron.decoder.exchange import Layout
from regate_megatron.errors import refuse


def watched(hidden_LBH: Tensor, watch: Watcher) -> Tensor:
    """The hidden states, to go on with; their gradient is told to ``watch``.

    Where nothing before them is trained no gradient would come this far: they become a leaf that asks for it.
    """
    if not torch.is_grad_enabled():
        return hidden_LBH
    if not hidden_LBH.requires_grad:
        hidden_LBH = hidden_LBH.detach().requires_grad_()
    watch(torch.zeros(hidden_LBH.shape[:2], dtype=torch.float32, device=hidden_LBH.device))

    def tell(gradient_LBH: Tensor) -> None:
        watch(torch.linalg.vector_norm(gradient_LBH, dim=-1, dtype=torch.float32))

    hidden_LBH.register_hook(tell)
    return hidden_LBH


def own_norms(norms: Mapping[int, Tensor], layout: Layout) -> Tensor:
    """What this rank sends: its rank among those that share a sequence, then its norms, microbatch by microbatch.

    Waits for the device; float32 [1 + X] on the CPU, [0] where the rank has none.
    """
    if not norms:
        return torch.zeros(0)
    parts = [norms[index].reshape(-1) for index in sorted(norms)]
    return torch.cat([torch.tensor([float(layout.rank)]), torch.cat(parts).cpu()])


def put_together(sent: Sequence[Tensor], facts: Sequence[MicrobatchFacts], layout: Layout) -> Tensor:
    """The norm at every position of the step, from what the replica's ranks sent; float32 [P].

    Ranks that hold the same part (tensor parallelism without sequence parallelism) have sent the same.

    Raises:
        ReGateError: the model's sequence is not as long as the batch was read.
    """
    by_rank: dict[int, Tensor] = {}
    for own in sent:
        if len(own):
            by_rank.setdefault(int(own[0]), own[1:])
    norm_RX = torch.stack([own for _, own in sorted(by_rank.items())])
    wanted = sum(one.is_target_BS.numel() for one in facts)
    if norm_RX.numel() != wanted:
        raise refuse(
            "hidden states",
            given=f"{norm_RX.numel()} positions in a step whose batches were read as {wanted}",
            allowed="the merged rows of pretrain_gpt.py and pretrain_vlm.py",
            change="the batches to that layout, or train without --regate",
        )
    found, at = [], 0
    for one in facts:
        rows = len(one.is_target_BS)
        dense = places(one.segment_length_N, cp_size=layout.cp_size, tp_size=layout.sp_size)
        size = rows * dense.local_length
        piece_RLB = norm_RX[:, at : at + size].view(len(norm_RX), dense.local_length, rows)
        found.append(piece_RLB[dense.rank_L, dense.index_L].t().reshape(-1))
        at += size
    return torch.cat(found)
