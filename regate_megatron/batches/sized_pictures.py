"""Batches of Megatron-Bridge's Ministral 3: pictures padded to one size, with the size of each beside them.

A picture is cut into square cells, and every cell is one placeholder; the ids that end its lines are text.

Shapes: B rows, S positions, I pictures, C channels, H and W pixels of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regate_megatron.batches.media import cells_of_image
from regate_megatron.batches.placeholders import Medium, PlaceholderBatches, visual_inputs


@dataclass(frozen=True)
class SizedPictures(PlaceholderBatches):
    """Adapter of batches with ``pixel_values`` [I, C, H, W] and ``image_sizes`` [I, 2].

    Attributes:
        image_token: the placeholder's id.
        cell: pixels per side that become one visual position.
    """

    image_token: int
    cell: int

    def kinds(self, batch: dict[str, Any], token_BS: Tensor) -> Tensor:
        """See :meth:`PlaceholderBatches.kinds`."""
        return (token_BS == self.image_token).int()

    def media(self, batch: dict[str, Any], count_of: Mapping[int, int]) -> dict[int, list[Medium]]:
        """See :meth:`PlaceholderBatches.media`."""
        visual = visual_inputs(batch)
        pixels_ICHW, size_I2 = visual.get("pixel_values"), visual.get("image_sizes")
        if pixels_ICHW is None:
            return {}
        if size_I2 is None or len(size_I2) != len(pixels_ICHW):
            raise ValueError(f"image_sizes {size_I2} for {len(pixels_ICHW)} pictures")
        return {1: [self._medium(*pair) for pair in zip(pixels_ICHW, size_I2, strict=True)]}

    def _medium(self, padded_CHW: Tensor, size_2: Tensor) -> Medium:
        height, width = size_2.tolist()
        rows, columns = height // self.cell, width // self.cell
        picture_CHW = padded_CHW[:, :height, :width]
        return Medium(
            count=rows * columns,
            pixels=picture_CHW,
            grid=(1, rows, columns),
            values=lambda: cells_of_image(picture_CHW[:, : rows * self.cell, : columns * self.cell], rows, columns),
            content=(size_2.long().numpy(),),
        )
