"""Text batches of pretrain_gpt.py: ``tokens``, ``labels``, ``loss_mask`` [B, S], merged positions = text positions.

With ``cu_seqlens`` [B, S+1] (``--sft``, ``--dataloader-inter-document-masking``) rows are packed: Megatron lays the B
rows of a microbatch one after the other and so do the facts, [1, B·S], one sample per segment. With ``cu_seqlens_q``
(Megatron-Bridge's ``enable_in_batch_packing``) a batch is one packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, position_ids, targets_of, to_cpu
from regate_megatron.batches.samples import Samples
from regate_megatron.batches.segments import Segments, samples_of


@dataclass(frozen=True)
class GPTBatches(BatchAdapter):
    """Adapter for GPTModel batches.

    Attributes:
        reads_position_ids: whether the model has learned positions. Rotary ones start at 0 in each sample whatever the
            batch says, except those of mrope (three axes), which are relative: an offset changes no loss.
    """

    reads_position_ids: bool = False

    keys = "tokens, labels and loss_mask; position_ids and cu_seqlens (cu_seqlens_q) where there are any"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BS, label_BS = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        is_target_BS, has_loss_BS = targets_of(batch["loss_mask"], label_BS)
        position_id_BS = position_ids(batch, token_BS)
        packed, sample_BS = Segments.of(batch, token_BS.shape), None
        if packed is not None:
            sample_BS = packed.sample_1S
        elif batch.get("cu_seqlens") is not None:
            sample_BS = samples_of(to_cpu(batch["cu_seqlens"]).long(), token_BS.shape[1])
            token_BS, label_BS, is_target_BS, has_loss_BS, position_id_BS = (
                value.reshape(1, -1, *value.shape[2:])
                for value in (token_BS, label_BS, is_target_BS, has_loss_BS, position_id_BS)
            )
        samples = Samples(
            token_BS,
            label_BS,
            is_target_BS,
            is_real_BN=has_loss_BS,
            length_N=None if sample_BS is None else np.bincount(sample_BS[0].numpy()),
            is_padding_BN=packed.is_padding_1S if packed is not None and packed.says_padding else None,
        )
        reads_ids = self.reads_position_ids or position_id_BS.dim() == 3  # of mrope
        return MicrobatchFacts(
            is_target_BS=is_target_BS,
            is_context_BS=~is_target_BS & ~samples.is_padding_BN,
            is_visual_BS=torch.zeros_like(is_target_BS),
            token_BS=token_BS,
            position_id_BS=position_id_BS,
            label_BS=label_BS,
            sample_BS=sample_BS,
            **samples.keys(position_id_BS if reads_ids else None),
        )

    def read_all(self, batches: Sequence[dict[str, Any]]) -> list[MicrobatchFacts]:
        """See :meth:`BatchAdapter.read_all`; unpacked rows of one length are read at once."""
        joined = _joined(batches)
        return [self.read(batch) for batch in batches] if joined is None else self.read(joined).split(len(batches))


def _joined(batches: Sequence[dict[str, Any]]) -> dict[str, Tensor] | None:
    """The rows of all batches as one batch; None where they are packed, not alike, or no batches of this layout."""
    names = ["tokens", "labels", "loss_mask", "position_ids"][: 3 if batches[0].get("position_ids") is None else 4]
    shapes = {tuple(getattr(batch.get(name), "shape", None) for name in (*names, "position_ids")) for batch in batches}
    is_packed = any(batch.get(name) is not None for batch in batches for name in ("cu_seqlens", "cu_seqlens_q"))
    if is_packed or len(shapes) > 1 or None in next(iter(shapes))[: len(names)]:
        return None
    columns = {name: [to_cpu(batch[name]) for batch in batches] for name in names}
    row_axis = {"position_ids": 1 if columns.get("position_ids", columns["tokens"])[0].dim() == 3 else 0}  # of mrope
    return {name: torch.cat(values, dim=row_axis.get(name, 0)) for name, values in columns.items()}
