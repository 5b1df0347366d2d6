"""Text batches of pretrain_gpt.py: ``tokens``, ``labels``, ``loss_mask`` [B, S], merged positions = text positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import (
    MicrobatchFacts,
    before_last_target,
    content_keys,
    position_ids,
    to_cpu,
    trailing_padding,
    without_loss,
)


class GPTBatches:
    """Adapter for GPTModel batches."""

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BS, label_BS = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        is_target_BS = to_cpu(batch["loss_mask"]) > 0
        is_padding_BS = trailing_padding(token_BS, is_target_BS)
        is_content_BS = before_last_target(is_target_BS, ~is_padding_BS)
        target_label_BS = torch.where(is_target_BS, label_BS, -1)  # a label without loss is not content
        position_id_BS = position_ids(batch, token_BS)
        parts = [token_BS, target_label_BS, *([position_id_BS] if position_id_BS.dim() == 3 else [])]
        rows = zip(is_content_BS, *parts, strict=True)
        key_N2 = content_keys([[part_S[real].numpy() for part_S in parts_S] for real, *parts_S in rows])
        return MicrobatchFacts(
            is_target_BS=is_target_BS,
            is_context_BS=~is_target_BS & ~is_padding_BS,
            is_visual_BS=torch.zeros_like(is_target_BS),
            token_BS=token_BS,
            position_id_BS=position_id_BS,
            label_BS=label_BS,
            reference_key_N2=key_N2,
            difficulty_key_N2=key_N2,
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        return dict(batch, loss_mask=without_loss(batch["loss_mask"], is_elided_BS))
