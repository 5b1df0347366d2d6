"""Batches of Megatron-Bridge's Qwen-VL models and of those that follow them: media with grids of patches.

The collators of Bridge write the placeholders of an image or video out in full and put pixels and grids into a
``visual_inputs`` object. The position ids of the batch are ignored: the model makes its own, with three axes (mRoPE),
from ids and grids, and the adapter asks the same function.

Shapes: B rows, S positions, I images (or videos) of the microbatch in the order of their placeholders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import position_ids
from regate_megatron.batches.media import some_of_each
from regate_megatron.batches.placeholders import Medium, PlaceholderBatches, visual_inputs
from regate_megatron.batches.segments import Segments

_KINDS = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}
_STATED = "mm_token_type_ids"


def of_blocks(pixels: Tensor, _grid_3: Tensor, merge_size: int) -> np.ndarray:
    """A few values under each position, where patches that become one lie one after the other; float [N, D]."""
    return some_of_each(pixels.unflatten(0, (-1, merge_size**2)).flatten(1))


@dataclass(frozen=True)
class QwenVLBatches(PlaceholderBatches):
    """Adapter of batches whose images and videos have grids.

    Attributes:
        image_token, video_token: the placeholders' ids (``config.image_token_id``, ``config.video_token_id``).
        merge_size: patches per side that become one visual token (``vision_config.spatial_merge_size``).
        rope_index: the model's ``get_rope_index``; without one positions are 0, 1, 2 …
        takes_positions: whether they are the batch's own instead.
        cells: what lies under each position of a medium, from its pixels, its grid [3] and ``merge_size``; [N, D].
        takes_kinds: whether the batch says which placeholders are a video's (``mm_token_type_ids``): GLM-4.5V writes
            its frames with the image's id.
    """

    image_token: int
    video_token: int
    merge_size: int
    rope_index: Callable[..., tuple[Tensor, Tensor]] | None = None
    takes_positions: bool = False
    cells: Callable[[Tensor, Tensor, int], np.ndarray] = of_blocks
    takes_kinds: bool = False

    def kinds(self, batch: dict[str, Any], token_BS: Tensor) -> Tensor:
        """See :meth:`PlaceholderBatches.kinds`: 1 is an image's, 2 a video's."""
        stated = visual_inputs(batch).get(_STATED) if self.takes_kinds else None
        kind_BS = (token_BS == self.image_token).int()
        if stated is None:
            return torch.where(token_BS == self.video_token, 2 - kind_BS, kind_BS)
        is_placeholder_BS, kind_BS = kind_BS > 0, torch.zeros_like(kind_BS)
        if len(stated) != len(kind_BS) or stated.shape[1] > kind_BS.shape[1]:
            raise ValueError(f"{_STATED} {tuple(stated.shape)} for rows {tuple(kind_BS.shape)}")
        kind_BS[:, : stated.shape[1]] = stated.int()
        if not torch.equal(kind_BS > 0, is_placeholder_BS):
            raise ValueError(
                f"{_STATED} that are not above 0 where a placeholder {self.image_token} is, and there alone"
            )
        return kind_BS

    def positions(self, batch: dict[str, Any], token_BS: Tensor, kind_BS: Tensor, packed: Segments | None) -> Tensor:
        """As the model makes them, axes last: int64 [B, S, 3]; [B, S] without ``rope_index``."""
        if self.takes_positions:
            return position_ids(batch, token_BS)
        if self.rope_index is None:
            return super().positions(batch, token_BS, kind_BS, packed)
        rows, is_real = (token_BS, kind_BS), None
        if packed is not None:
            rows, is_real = (packed.as_rows(token_BS), packed.as_rows(kind_BS)), packed.is_real_NM.long()
        visual = visual_inputs(batch)
        grids = [visual.get(grid_name) for _, grid_name in _KINDS.values()]
        seconds = visual.get("second_per_grid_ts")
        position_3BS, _ = self.rope_index(*rows, *grids, second_per_grid_ts=seconds, attention_mask=is_real)
        position_BS3 = position_3BS.permute(1, 2, 0).long()
        return position_BS3 if packed is None else packed.in_one_row(position_BS3)

    def media(self, batch: dict[str, Any], count_of: Mapping[int, int]) -> dict[int, list[Medium]]:
        """See :meth:`PlaceholderBatches.media`."""
        visual, brought = visual_inputs(batch), {}
        for kind, (pixel_name, grid_name) in _KINDS.items():
            pixels, grid_I3 = visual.get(pixel_name), visual.get(grid_name)
            if pixels is None or grid_I3 is None:
                continue
            patches_I = grid_I3.prod(dim=-1).tolist()
            if sum(patches_I) != len(pixels):
                raise ValueError(f"{len(pixels)} patches in grids of {patches_I}")
            seconds = visual.get("second_per_grid_ts") if kind == 2 else None
            brought[kind] = [
                self._medium(grid_I3[image], piece, None if seconds is None else seconds[image : image + 1])
                for image, piece in enumerate(pixels.split(patches_I))
            ]
        return brought

    def _medium(self, grid_3: Tensor, pixels: Tensor, second_1: Tensor | None) -> Medium:
        frames, height, width = grid_3.tolist()
        content: list[np.ndarray] = [grid_3.numpy()]
        if second_1 is not None:  # spaces the frames' positions
            content.append(second_1.double().numpy())
        return Medium(
            count=len(pixels) // self.merge_size**2,
            pixels=pixels,
            grid=(frames, height // self.merge_size, width // self.merge_size),
            values=lambda: self.cells(pixels, grid_3, self.merge_size),
            content=tuple(content),
        )
