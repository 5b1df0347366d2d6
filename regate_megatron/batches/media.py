"""Images and clips of a microbatch: which visual positions are theirs, and what lies under each.

The visual positions of a row belong to its media (images, tiles, clips) one after the other, each in raster order:
frame by frame, row by row. Text may stand between two positions of a medium, but never a position of another.

Shapes: I media and V visual positions of the microbatch, in the order in which they lie in its rows; N places of a
grid, D values under each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VALUES = 64
"""About how many values of what lies under a position are looked at: rules that read pixels are to be cheap."""

_RUN, _GOLDEN = 8, 0.6180339887498949
_LEADS = (0, 1, 5, 8, 16, 32)  # class tokens of the towers that Megatron has


@dataclass(frozen=True, kw_only=True)
class Media:
    """The media of a microbatch; counts and grids need no pixel.

    Attributes:
        sample_I: the sample each lies in; int64, ascending.
        count_I: its visual positions in the row; int64. Fewer than its grid and lead say where the row is cut at its
            greatest length: the last ones are missing then.
        grid_I3: frames, height and width in visual positions, as the decoder sees them (merged); int64. An image has
            one frame. All 0 where a medium's is not known: it is an image then. None: none is known.
        lead_I: visual positions of each before its grid begins (class tokens); they hold no part of the picture; int64.
            None: there are none.
        pixels: gives about :data:`VALUES` values of what lies under every place of the grid of medium i; float [N, D].
            None: the batch brings no pixels, or a grid is not known.
    """

    sample_I: Tensor
    count_I: Tensor
    grid_I3: Tensor | None = None
    lead_I: Tensor | None = None
    pixels: Callable[[int], np.ndarray] | None = None

    @classmethod
    def none(cls) -> Media:
        """Those of a batch of text."""
        return cls(sample_I=torch.zeros(0, dtype=torch.int64), count_I=torch.zeros(0, dtype=torch.int64))


def image_grid(num_positions: int, height: int, width: int) -> tuple[int, int, int] | None:
    """(lead, rows, columns) of an image's visual positions; None where square cells cannot be told.

    A vision tower cuts an image into square cells, merged ones included, and may put a few class tokens before them.

    Args:
        num_positions: visual positions of an image.
        height, width: of the image in pixels.
    """
    for lead in _LEADS:
        if lead >= num_positions:
            break
        area, rest = divmod(height * width, num_positions - lead)
        side = math.isqrt(area)
        if not rest and side and side * side == area and not height % side and not width % side:
            return lead, height // side, width // side
    return None


def cells_of_image(image_CHW: Tensor, rows: int, columns: int) -> np.ndarray:
    """A few pixels under each visual position of an image, evenly spaced; float [rows · columns, D]."""
    channels, height, width = image_CHW.shape
    side = height // rows
    step = max(1, math.ceil(side / math.sqrt(max(VALUES // channels, 1))))
    cells = image_CHW.reshape(channels, rows, side, columns, width // columns)[:, :, ::step, :, ::step]
    return cells.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1).float().numpy()


def some_of_each(value_ND: Tensor) -> np.ndarray:
    """About :data:`VALUES` of the values of each place, in short runs spread over all of them; float [N, D'].

    Bringing them from memory is what costs: a run lies in one cache line or two, as many values apart in a line each.
    """
    width = value_ND.shape[1]
    run = math.gcd(width, _RUN)
    index = _starts(width // run, VALUES // run)
    bytes_ND = value_ND.contiguous().view(torch.uint8).numpy()
    run_NR = np.take(bytes_ND.view(f"V{run * value_ND.element_size()}"), index, axis=1)
    return torch.from_numpy(run_NR.view(np.uint8)).view(value_ND.dtype).float().numpy()


def _starts(count: int, most: int) -> np.ndarray:
    """Up to ``most`` of ``count`` places, one in each of as many equal parts, nowhere the same in two of them: else all
    could lie in one row or column of a patch.
    """
    if count <= most:
        return np.arange(count)
    part = np.arange(most)
    return ((part + part * _GOLDEN % 1) * count / most).astype(np.int64)
