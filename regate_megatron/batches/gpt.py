"""Text batches of pretrain_gpt.py: ``tokens``, ``labels``, ``loss_mask`` [B, S], merged positions = text positions.

With ``cu_seqlens`` [B, S+1] (``--sft``, ``--dataloader-inter-document-masking``) rows are packed: Megatron lays the B
rows of a microbatch one after the other and so do the facts, [1, B·S], one sample per segment.
"""

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
        is_target_BS, position_id_BS = to_cpu(batch["loss_mask"]) > 0, position_ids(batch, token_BS)
        sample_BS = None
        if batch.get("cu_seqlens") is not None:
            sample_BS = samples_of(to_cpu(batch["cu_seqlens"]).long(), token_BS.shape[1])
            token_BS, label_BS, is_target_BS, position_id_BS = (
                value.reshape(1, -1) for value in (token_BS, label_BS, is_target_BS, position_id_BS)
            )
        # One row per sample: a packed row cut at its segments.
        token_NS, target_NS, target_label_NS = (
            by_sample(value, sample_BS) for value in (token_BS, is_target_BS, torch.where(is_target_BS, label_BS, -1))
        )  # a label without loss is not content
        key_N2, is_padding = [], []
        for token_S, target_S, label_S in zip(token_NS, target_NS, target_label_NS, strict=True):
            padding_S = trailing_padding(token_S[None], target_S[None])[0]
            real_S = before_last_target(target_S[None], ~padding_S[None])[0]
            key_N2.append([token_S[real_S].numpy(), label_S[real_S].numpy()])
            is_padding.append(padding_S)
        is_padding_BS = torch.cat(is_padding).view_as(is_target_BS)
        key_N2 = content_keys(key_N2)
        return MicrobatchFacts(
            is_target_BS=is_target_BS,
            is_context_BS=~is_target_BS & ~is_padding_BS,
            is_visual_BS=torch.zeros_like(is_target_BS),
            token_BS=token_BS,
            position_id_BS=position_id_BS,
            label_BS=label_BS,
            reference_key_N2=key_N2,
            difficulty_key_N2=key_N2,
            sample_BS=sample_BS,
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        loss_mask = batch["loss_mask"]
        return dict(batch, loss_mask=without_loss(loss_mask, is_elided_BS.view(loss_mask.shape)))


def samples_of(cu_seqlens_BX: Tensor, length: int) -> Tensor:
    """The sample of each position when B packed rows of ``length`` lie one after the other; int64 [1, B·S].

    Args:
        cu_seqlens_BX: where segments start, from 0 to ``length``; repeats of ``length`` at the end are fill.

    Raises:
        ValueError: a row's segments do not cover it.
    """
    if bool((cu_seqlens_BX[:, 0] != 0).any() or (cu_seqlens_BX.amax(dim=1) != length).any()):
        raise ValueError(f"cu_seqlens that do not run from 0 to {length}")
    length_BN = cu_seqlens_BX.diff(dim=1)
    length_N = length_BN[length_BN > 0]
    if int(length_N.sum()) != length * len(cu_seqlens_BX):
        raise ValueError("cu_seqlens that go back")
    return torch.arange(len(length_N)).repeat_interleave(length_N)[None]


def by_sample(value_BS: Tensor, sample_BS: Tensor | None) -> list[Tensor]:
    """The values of each sample, in order."""
    if sample_BS is None:
        return list(value_BS)
    return list(value_BS[0].split(torch.bincount(sample_BS[0]).tolist()))
