"""Pictures of a LLaVAModel whose tower makes equally many positions of each: images of one size, tiles, frames.

A placeholder stands for an image, cut into tiles or not. Tiles of one image are pictures of their own, unless the batch
says in ``num_frames`` that they are the frames of a clip, in the order of time.

Shapes: I images (placeholders), T tiles, M media.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import to_cpu
from regate_megatron.batches.media import Media, cells_of_image, image_grid

_IMAGE_KEYS, _TILE_KEYS = ("image", "images", "imgs"), ("num_image_tiles", "num_tiles")


class Pictures(Protocol):
    """The pictures of a microbatch in the order of their placeholders.

    Attributes:
        length_I: merged positions of each; int64.
        layout: what every sample has in common that its losses depend on.
    """

    length_I: Tensor
    layout: list[np.ndarray]

    def media(self, sample_I: Tensor, left_I: Tensor) -> Media:
        """Their media.

        Args:
            sample_I: the sample each lies in; int64, ascending.
            left_I: its positions that the model does not cut off, the first ones; int64.
        """
        ...

    def content(self, own: slice) -> list[np.ndarray]:
        """What losses of a sample with these depend on, pixels left out."""
        ...

    def bytes_of(self, own: slice) -> list[np.ndarray]:
        """The pixels of these; nothing where the batch brings none."""
        ...


class Tiles:
    """See :class:`Pictures`.

    Args:
        count: placeholders of the batch.
        image_token: their id, for messages.
        image_length: positions of a tile.

    Raises:
        ValueError: images, tiles and placeholders do not fit together.
    """

    def __init__(self, batch: dict[str, Any], count: int, image_token: int, image_length: int) -> None:
        self._images, self._image_length = given_images(batch), image_length
        self._tiles_I = _tiles(batch, self._images, count, image_token)
        self._frames_I = _frames(batch, self._tiles_I)
        self._end_I = self._tiles_I.cumsum(0)
        self.length_I = self._tiles_I * image_length
        self.layout = [np.array([image_length])]

    def content(self, own: slice) -> list[np.ndarray]:
        """See :class:`Pictures`."""
        tiles_I = self._tiles_I[own]
        return [tiles_I.numpy()] if bool((tiles_I != 1).any()) else []

    def bytes_of(self, own: slice) -> list[np.ndarray]:
        """See :class:`Pictures`."""
        end_I = self._end_I[own].tolist()
        if self._images is None or not end_I:
            return []
        first = end_I[0] - int(self._tiles_I[own.start])
        return [as_bytes(to_cpu(self._images[first : end_I[-1]]))]

    def media(self, sample_I: Tensor, left_I: Tensor) -> Media:
        """One medium per tile or clip; of what the model cuts off, the first positions are left, or none."""
        images, tiles_I, frames_I = self._images, self._tiles_I, self._frames_I
        grid = None
        if images is not None and len(images.shape) == 4:
            grid = image_grid(self._image_length, *images.shape[-2:])
        lead, *cells = grid or (0, None, None)
        if grid is None or lead:  # class tokens lie between the frames: no one grid
            frames_I = torch.ones_like(tiles_I)
        image_M = torch.arange(len(tiles_I)).repeat_interleave(tiles_I // frames_I)
        frames_M = frames_I[image_M]
        end_M = frames_M.cumsum(0)  # in tiles
        first_M, first_I = end_M - frames_M, self._end_I - tiles_I
        left_M = left_I[image_M] - (first_M - first_I[image_M]) * self._image_length
        media = {
            "sample_I": sample_I[image_M],
            "count_I": left_M.clamp_min(0).minimum(frames_M * self._image_length),
        }
        if grid is None:
            return Media(**media)

        def pixels(medium: int) -> np.ndarray:
            own = to_cpu(images[int(first_M[medium]) : int(end_M[medium])])
            return np.concatenate([cells_of_image(tile, *cells) for tile in own])

        grid_M3 = torch.cat((frames_M[:, None], torch.tensor([cells]).expand(len(frames_M), -1)), dim=1)
        return Media(**media, grid_I3=grid_M3, lead_I=torch.full_like(frames_M, lead), pixels=pixels)


def _tiles(batch: dict[str, Any], images: Any, count: int, image_token: int) -> Tensor:
    """Tiles of each image; int64 [I]."""
    given = next((batch[key] for key in _TILE_KEYS if batch.get(key) is not None), None)
    if given is None:
        if images is not None and len(images) != count:
            raise ValueError(f"{len(images)} images for {count} placeholders {image_token}")
        return torch.ones(count, dtype=torch.int64)
    tiles_I = to_cpu(torch.as_tensor(given)).long().flatten()
    if len(tiles_I) != count or bool((tiles_I < 1).any()):
        raise ValueError(f"tiles {few(tiles_I)} for {count} placeholders {image_token}")
    if images is not None and len(images) != int(tiles_I.sum()):
        raise ValueError(f"{len(images)} images for tiles {few(tiles_I)}")
    return tiles_I


def _frames(batch: dict[str, Any], tiles_I: Tensor) -> Tensor:
    """How many of each image's tiles are frames of one clip: one, or all."""
    if batch.get("num_frames") is None:
        return torch.ones_like(tiles_I)
    frames_I = to_cpu(torch.as_tensor(batch["num_frames"])).long().flatten()
    if len(frames_I) != len(tiles_I) or bool(((frames_I != 1) & (frames_I != tiles_I)).any()):
        raise ValueError(f"num_frames {few(frames_I)} for tiles {few(tiles_I)}, not 1 or all tiles of each image")
    return frames_I


def given_images(batch: dict[str, Any]) -> Any:
    """[T, C, H, W]; a collator that stacks clips makes one more axis of their frames. None: there are none."""
    given = next((batch[key] for key in _IMAGE_KEYS if batch.get(key) is not None), None)
    return given.flatten(0, 1) if torch.is_tensor(given) and given.ndim == 5 else given


def as_bytes(images: Tensor) -> np.ndarray:
    """Of pixels."""
    return images.contiguous().view(torch.uint8).reshape(-1).numpy()


def few(value_I: Tensor) -> str:
    """Up to eight of them, for a message."""
    return f"{value_I[:8].tolist()}{' and more' if len(value_I) > 8 else ''}"
