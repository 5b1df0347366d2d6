"""Batches of ms-swift, whose models are mcore-bridge's: labels not shifted yet, no loss mask, media beside the tokens.

The trainer rolls labels by one when it takes a batch, and gives every label that is not −100 a loss. Placeholders are
written out in full and positions (mRoPE) come with the batch. With ``padding_free`` (``--packing true``) a batch is one
row: a sample begins wherever the text positions begin anew, and ``seq_lens`` says how many there are.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, to_cpu
from regate_megatron.batches.qwen_vl import QwenVLBatches

_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def with_grids(batch: dict[str, Any]) -> dict[str, Any]:
    """Pixels and grids as the batch has them."""
    return {name: batch[name] for name in _MEDIA if batch.get(name) is not None}


@dataclass(frozen=True)
class SwiftBatches(BatchAdapter):
    """Adapter for ms-swift batches.

    Attributes:
        adapter: reads tokens and media.
        media: pixels and grids of a batch, under the names that Qwen-VL has for them.
    """

    adapter: QwenVLBatches
    media: Callable[[dict[str, Any]], dict[str, Any]] = with_grids

    keys = "input_ids, labels and position_ids; seq_lens, text_position_ids, attention_mask_2d, media and grids"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BS, label_BS = to_cpu(batch["input_ids"]).long(), _shifted(to_cpu(batch["labels"]).long())
        has_loss_BS = label_BS >= 0
        if batch.get("loss_scale") is not None:
            has_loss_BS = has_loss_BS & (_shifted(to_cpu(batch["loss_scale"])) > 0)
        given = {"input_ids": token_BS, "labels": label_BS, "loss_mask": has_loss_BS.float()}
        given |= {"visual_inputs": _Media(self.media(batch))}
        given |= {"attention_mask": batch.get("attention_mask_2d")}
        return self.adapter.read(given | _packing(batch, token_BS.shape) | {"position_ids": batch["position_ids"]})

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """A shallow copy of ``batch`` whose labels are −100 where elided targets predict them."""
        labels = batch["labels"]
        is_gone_BS = torch.roll(is_elided_BS.view(labels.shape), 1, dims=-1).to(labels.device)
        return dict(batch, labels=labels.masked_fill(is_gone_BS, -100))


@dataclass(frozen=True)
class _Media:
    """Stands where Megatron-Bridge's ``visual_inputs`` does."""

    values: dict[str, Tensor]

    def normalized_for_model(self) -> dict[str, Tensor]:
        """All of them; they are flat already."""
        return self.values


def _shifted(value_BS: Tensor) -> Tensor:
    """As the trainer shifts labels: what follows the last is the first."""
    return torch.roll(value_BS, -1, dims=-1)


def _packing(batch: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Where samples of the one row start and end; nothing for padded rows of one sample each.

    A row of one sample is packed, too, where nothing masks its padding: the trainer has packing parameters for it.

    The row may be filled up behind its samples, with positions that begin anew: ``seq_lens`` says how many samples
    there are. It does not say how long: for context ranks each is filled up after it is counted, and ends later. There
    the fill is cut in segments of its own, which are samples without a position; else it is the end of the last sample.

    Raises:
        ValueError: there are fewer starts than samples.
    """
    if shape[0] > 1 or batch.get("attention_mask_2d") is not None:
        return {}
    text = batch.get("text_position_ids")
    text_S = to_cpu(batch["position_ids"] if text is None else text).reshape(-1, shape[1])[0]
    starts, counted = torch.where(text_S == 0)[0], batch.get("seq_lens")
    count = len(starts) if counted is None else len(counted)
    if len(starts) < count:
        raise ValueError(f"{count} seq_lens for {len(starts)} positions 0")
    starts = torch.cat([starts, torch.tensor([shape[1]])])
    end, real = starts[count : count + 1], starts[:count]
    if not bool(text_S[end:].any()):
        return {"cu_seqlens_q": torch.cat([real, end]), "cu_seqlens_q_padded": torch.cat([real, starts[-1:]])}
    return {"cu_seqlens_q": starts.minimum(end), "cu_seqlens_q_padded": starts}
