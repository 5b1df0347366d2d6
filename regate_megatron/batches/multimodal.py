"""Batches of examples/multimodal (Megatron-energon): labels not yet shifted, no loss mask, flat tiles.

The script takes ``labels[:, 1:]`` as labels and makes its loss mask from them: 0 where a label is the pad id or
``IGNORE_INDEX``. So an elided target is marked by writing ``IGNORE_INDEX`` over its label. Text-only batches bring a
dummy image [1, 1], and batches that are not packed bring dummy ``cu_lengths`` [1, 1]. Packed ones
(``--packing-buffer-size``, or a data set of lists of samples) are one row.

Batches that have a loss mask (pretrain_vlm.py's) pass through to the adapter behind.

Shapes: B rows, N text entries of a row, S merged positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, to_cpu

IGNORE_INDEX = -100  # of Megatron's LLaVA and of torch's cross entropy
_DUMMY = torch.Size([1, 1])


@dataclass(frozen=True)
class MultimodalBatches(BatchAdapter):
    """Adapter for LLaVAModel batches with or without a loss mask.

    Attributes:
        merged: reads batches that have a loss mask.
        pad_token: the tokenizer's pad id; None where no label holds it.
    """

    merged: BatchAdapter
    pad_token: int | None

    keys = (
        "tokens, labels and loss_mask, or tokens, labels and cu_lengths; "
        "images, image or imgs (and num_tiles, num_frames)"
    )

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        return self.merged.read(batch if "loss_mask" in batch else self._with_loss_mask(batch))

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`; without a loss mask it is the labels that change."""
        if "loss_mask" in batch:
            return self.merged.elide(batch, is_elided_BS)
        before = self._with_loss_mask(batch)
        is_elided_BN = before["loss_mask"] > self.merged.elide(before, is_elided_BS)["loss_mask"]
        labels = batch["labels"].clone()
        num_entries = is_elided_BN.shape[1]
        labels[:, 1 : num_entries + 1].masked_fill_(is_elided_BN.to(labels.device), IGNORE_INDEX)
        return dict(batch, labels=labels)

    def _with_loss_mask(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same batch in pretrain_vlm.py's layout, as the script itself would make it."""
        tokens_BN = to_cpu(batch["tokens"])
        label_BN = to_cpu(batch["labels"])[:, 1 : tokens_BN.shape[1] + 1]
        has_loss_BN = label_BN != IGNORE_INDEX
        if self.pad_token is not None:
            has_loss_BN &= label_BN != self.pad_token
        read = {"tokens": tokens_BN, "labels": label_BN, "loss_mask": has_loss_BN.float()}
        if batch["cu_lengths"].shape != _DUMMY:
            read["cu_lengths"] = batch["cu_lengths"]
        if batch["imgs"].shape != _DUMMY:
            names = ("imgs", "num_tiles", "num_frames", "imgs_sizes")
            read |= {key: batch[key] for key in names if key in batch}
        return read
