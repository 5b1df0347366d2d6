"""Pictures of a LLaVAModel of dynamic resolution: every one has its own size, and its own number of positions.

The batch brings all patches in one row, and in ``imgs_sizes`` the size of every picture or frame in pixels. A picture
or frame is one placeholder; where the tower makes one of several frames (``temporal_patch_dim``), so many frames are,
and then all have equally many positions. ``num_frames`` says which are the frames of a clip, in the order of time.

Shapes: F pictures and frames, I placeholders, P patches of D values, M media; N positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import to_cpu
from regate_megatron.batches.media import Media, some_of_each
from regate_megatron.batches.tiles import as_bytes, few, given_images

_COLORS = 3


@dataclass(frozen=True)
class Resolution:
    """What the model makes of patches.

    Attributes:
        merged: patches that become one position: 1, or 4 with pixel shuffle.
        in_squares: whether these four are a square; else four in the order of the row.
        frames: frames that become one (``temporal_patch_dim``).
        length: positions of a placeholder where ``frames`` is above 1.
        most_rows: rows of a microbatch with pictures, where Megatron-Core would give each the pictures of all.
    """

    merged: int = 1
    in_squares: bool = False
    frames: int = 1
    length: int | None = None
    most_rows: int | None = None


class DynamicPictures:
    """See :class:`~regate_megatron.batches.tiles.Pictures`.

    Args:
        count: placeholders of the batch.

    Raises:
        ValueError: patches, sizes, frames and placeholders do not fit together, or the model cannot merge them.
    """

    def __init__(self, batch: dict[str, Any], count: int, how: Resolution) -> None:
        self._how, self.layout = how, []
        self._size_F2, self._patch_PD, side = _patches(batch) if count else _NOTHING
        grid_F2 = self._size_F2 // side
        patches_F = grid_F2.prod(dim=1)
        if int(patches_F.sum()) != len(self._patch_PD):
            raise ValueError(f"{len(self._patch_PD)} patches for imgs_sizes of {few(patches_F)}")
        odd_F = (grid_F2 % 2).any(dim=1) if how.in_squares and how.merged > 1 else patches_F % how.merged > 0
        if bool(odd_F.any()):
            raise ValueError(f"imgs_sizes of {few(patches_F)} patches, of which pixel shuffle merges {how.merged}")
        self._patches_F, self._grid_F2 = patches_F, grid_F2
        self._frames_C = _frames(batch, len(patches_F), needed=how.frames > 1)
        groups_C = (self._frames_C + how.frames - 1) // how.frames
        if int(groups_C.sum()) != count:
            of = f" of {how.frames} frames" if how.frames > 1 else ""
            raise ValueError(f"{int(groups_C.sum())} pictures{of} in imgs_sizes for {count} placeholders")
        self._clip_I = torch.arange(len(groups_C)).repeat_interleave(groups_C)
        first_C, group_C = self._frames_C.cumsum(0) - self._frames_C, groups_C.cumsum(0) - groups_C
        self._first_I = first_C[self._clip_I] + (torch.arange(count) - group_C[self._clip_I]) * how.frames
        self.length_I = (patches_F // how.merged)[self._first_I]
        if how.frames > 1 and bool((self.length_I != how.length).any()):
            raise ValueError(
                f"imgs_sizes of {few(self.length_I)} positions, where the model counts {how.length} of each"
            )

    def _frames_of(self, image: int) -> list[int]:
        """The frames that a placeholder stands for; the last one again where a clip ends earlier."""
        clip, first = int(self._clip_I[image]), int(self._first_I[image])
        last = int(self._frames_C[: clip + 1].sum()) - 1
        return [min(first + offset, last) for offset in range(self._how.frames)]

    def _own(self, own: slice) -> slice:
        """The pictures and frames of some placeholders."""
        images = range(len(self.length_I))[own]
        if not images:
            return slice(0, 0)
        return slice(self._frames_of(images[0])[0], self._frames_of(images[-1])[-1] + 1)

    def content(self, own: slice) -> list[np.ndarray]:
        """See :class:`~regate_megatron.batches.tiles.Pictures`: sizes, and where clips begin."""
        size_F2, clip_I = self._size_F2[self._own(own)], self._clip_I[own]
        return [size_F2.numpy(), (clip_I - clip_I[:1]).numpy()] if len(size_F2) else []

    def bytes_of(self, own: slice) -> list[np.ndarray]:
        """See :class:`~regate_megatron.batches.tiles.Pictures`."""
        frames, end_F = self._own(own), self._patches_F.cumsum(0).tolist()
        before = end_F[frames.start - 1] if frames.start else 0
        return [as_bytes(self._patch_PD[before : end_F[frames.stop - 1]])] if frames.stop > frames.start else []

    def media(self, sample_I: Tensor, left_I: Tensor) -> Media:
        """One medium per picture or clip; frames that differ in size, or lie in several samples, are pictures."""
        if not len(self.length_I):
            return Media.none()
        same_I = (self._grid_F2[self._first_I].diff(dim=0) == 0).all(dim=1) & (sample_I.diff() == 0)
        goes_on_I = torch.cat([torch.tensor([False]), same_I & (self._clip_I.diff() == 0)])
        medium_I = (~goes_on_I).cumsum(0) - 1
        first_M = torch.where(~goes_on_I)[0]
        count_M = torch.zeros(len(first_M), dtype=torch.int64).index_add_(0, medium_I, left_I)
        frames_M, grid_M2 = torch.bincount(medium_I), self._grid_F2[self._first_I[first_M]]
        grid_M3 = torch.cat([frames_M[:, None], torch.stack([self._merged(*one) for one in grid_M2])], dim=1)
        end_F = self._patches_F.cumsum(0)

        def pixels(medium: int) -> np.ndarray:
            images = range(int(first_M[medium]), int(first_M[medium] + frames_M[medium]))
            return np.concatenate([self._under(image, end_F) for image in images])

        return Media(sample_I=sample_I[first_M], count_I=count_M, grid_I3=grid_M3, pixels=pixels)

    def _merged(self, height: Tensor, width: Tensor) -> Tensor:
        """Height and width in positions; all in one line where what is merged reaches over the end of a line."""
        if self._how.in_squares and self._how.merged > 1:
            return torch.stack([height, width]) // 2
        if int(width) % self._how.merged:
            return torch.stack([torch.ones_like(height), height * width // self._how.merged])
        return torch.stack([height, width // self._how.merged])

    def _under(self, image: int, end_F: Tensor) -> np.ndarray:
        """A few values under each position of a placeholder; float [N, D]."""
        frames = self._frames_of(image)
        patch_PD = torch.cat([self._patch_PD[int(end_F[f] - self._patches_F[f]) : int(end_F[f])] for f in frames], 1)
        if self._how.in_squares and self._how.merged > 1:
            height, width = (self._grid_F2[frames[0]] // 2).tolist()
            patch_PD = patch_PD.unflatten(0, (height, 2, width, 2)).transpose(1, 2).flatten(0, 3)
        return some_of_each(patch_PD.unflatten(0, (-1, self._how.merged)).flatten(1))


_NOTHING = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, _COLORS), 1


def _patches(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Sizes [F, 2], patches [P, D], and the side of a patch in pixels.

    Raises:
        ValueError: the batch has no such sizes or patches.
    """
    patches, sizes = given_images(batch), batch.get("imgs_sizes")
    if patches is None or sizes is None:
        raise ValueError("placeholders without images and imgs_sizes, where the model is of dynamic resolution")
    patch_PD, size_F2 = to_cpu(patches), to_cpu(torch.as_tensor(sizes)).long()
    side = math.isqrt(patch_PD.shape[-1] // _COLORS)
    if patch_PD.ndim != 3 or len(patch_PD) != 1 or side**2 * _COLORS != patch_PD.shape[-1] or size_F2.ndim != 2:
        raise ValueError(f"images {tuple(patch_PD.shape)}, imgs_sizes {tuple(size_F2.shape)}, not one row of patches")
    return size_F2, patch_PD[0], side


def _frames(batch: dict[str, Any], count: int, *, needed: bool) -> Tensor:
    """Frames of each picture (1) or clip; int64.

    Raises:
        ValueError: they are not as many as there are sizes.
    """
    given = batch.get("num_frames")
    if given is None:
        if needed and count:
            raise ValueError("imgs_sizes without num_frames, where the tower makes one of several frames")
        return torch.ones(count, dtype=torch.int64)
    frames_C = to_cpu(torch.as_tensor(given)).long().flatten()
    if count and (int(frames_C.sum()) != count or bool((frames_C < 1).any())):
        raise ValueError(f"num_frames {few(frames_C)} for {count} imgs_sizes")
    return frames_C if count else frames_C[:0]
