"""Batches of Megatron-LM's MIMO models: one id per modality stands for its positions, pictures in a nested dictionary.

``modality_inputs`` holds, by modality and encoder, what the encoder is called with; ``packing_kwargs``, where rows are
packed, where each sample of the one row starts. Labels come shifted, with a loss mask.

Shapes: I pictures of a modality, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import MicrobatchFacts, to_cpu
from regate_megatron.batches.media import cells_of_image, image_grid
from regate_megatron.batches.placeholders import Medium, PlaceholderBatches
from regate_megatron.batches.segments import Segments


@dataclass(frozen=True)
class MimoBatches(PlaceholderBatches):
    """Adapter of batches whose modalities are pictures of one encoder each.

    Attributes:
        names: the modalities.
        tokens: the id that stands for a position of each.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]

    pixels_in = "modality_inputs"
    keys = "input_ids, labels and loss_mask; modality_inputs, packing_kwargs and attention_mask where there are any"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        return super().read({**batch, **(batch.get("packing_kwargs") or {})})

    def padding(self, batch: dict[str, Any], token_BS: Tensor, packed: Segments | None) -> Tensor | None:
        """See :meth:`PlaceholderBatches.padding`; what a sample is filled up with before it is packed counts as its."""
        return super().padding(batch, token_BS, packed) if packed is None else None

    def kinds(self, batch: dict[str, Any], token_BS: Tensor) -> Tensor:
        """See :meth:`PlaceholderBatches.kinds`: modalities are counted from 1."""
        kind_BS = torch.zeros_like(token_BS)
        for kind, token in enumerate(self.tokens, 1):
            kind_BS[token_BS == token] = kind
        return kind_BS

    def media(self, batch: dict[str, Any], count_of: Mapping[int, int]) -> dict[int, list[Medium]]:
        """See :meth:`PlaceholderBatches.media`; the pictures of a modality have equally many positions."""
        given, brought = batch.get("modality_inputs") or {}, {}
        for kind, name in enumerate(self.names, 1):
            if given.get(name) is None:
                continue
            inputs = [to_cpu(value) for one in given[name].values() for value in one.values()]
            if len(inputs) != 1 or inputs[0].dim() != 4:
                raise ValueError(f"modality {name} of {[tuple(one.shape) for one in inputs]}, not one [I, C, H, W]")
            (pixels_ICHW,) = inputs
            count, rest = divmod(count_of.get(kind, 0), max(len(pixels_ICHW), 1))
            if rest:
                raise ValueError(f"{count_of[kind]} placeholders of {name} for {len(pixels_ICHW)} pictures")
            brought[kind] = [_medium(picture_CHW, count) for picture_CHW in pixels_ICHW]
        return brought


def _medium(picture_CHW: Tensor, count: int) -> Medium:
    found = image_grid(count, *picture_CHW.shape[1:])
    lead, rows, columns = found or (0, 0, 0)
    return Medium(
        count=count,
        pixels=picture_CHW,
        grid=(1, rows, columns) if found else None,
        values=lambda: cells_of_image(picture_CHW, rows, columns),
        lead=lead,
    )
