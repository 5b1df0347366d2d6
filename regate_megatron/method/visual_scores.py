"""What ranks the visual positions: one row of :data:`VISUAL_SCORES` per rule. Flags, checks and pages follow from it.

Of two positions of an image or clip the one with the larger score is kept first; ties go to the earlier place. Rules
look at content keys, places, pixels, and at what earlier steps taught, so that every layout ranks alike: a plan is made
before the step, from nothing that a model computes in it.

*A picture that does not move* has no earlier frame: what compares frames falls back to ``even`` there, and ``even`` to
chance where nobody knows how the tower cuts a picture.

Shapes: X candidates of a step, I images and clips (media), N places of a grid, D values under a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table is read where neither torch nor numpy is installed, too
    import numpy as np
    from torch import Tensor

# 2^64 times the powers of 1/g, where g^(d+1) = g + 1 in d dimensions: their multiples, summed over the axes of a grid,
# fill the unit interval evenly (Roberts' R sequences).
_PLANE = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1C)
_SPACE = (0xD1B54A32D192ED03, 0xABC98388FB8FAC02, 0x8CB92BA72F3D8DD7)
_ROUNDING = 1e-12  # of what is 0: places that are alike are ties
FIRST_FRAME = 3.0
"""Above every cosine distance."""


@dataclass(frozen=True, kw_only=True)
class VisualSignals:
    """What scores are made of, for every candidate of a step.

    Attributes:
        medium_X: the medium of each candidate, counted over the step; int64, ascending.
        place_X: its place in the grid of that; int64.
        grid_I3: frames, height and width of each medium, all 0 where they are not known; int64.
        pixels: gives what lies under every place of medium i; float [N, D].
        keys: gives the content key of each medium's sample, int64 [I, 2], the place of every candidate in its sample,
            int64 [X], and how many candidates each medium has, int64 [I].
        chance: a number in [0, 1) for each medium that changes with the step; float64 [I].
        gradient_X: how strong the gradient at each candidate has been in dense steps, 1 being the mean of its sample;
            float64, NaN where none was seen. None: the row does not ask for it.
    """

    medium_X: np.ndarray
    place_X: np.ndarray
    grid_I3: np.ndarray
    pixels: Callable[[int], np.ndarray]
    keys: Callable[[], tuple[Tensor, ...]]
    chance: Callable[[], np.ndarray]
    gradient_X: np.ndarray | None = None
    seed: int
    step: int


@dataclass(frozen=True)
class VisualScore:
    """One row of the table.

    Attributes:
        formula: for people.
        of: the score of every candidate, float64 [X], finite.
        needs_pixels: whether it reads pixels, each at its place of a known grid.
        needs_gradient: whether dense steps have to be watched for gradients.
    """

    formula: str
    of: Callable[[VisualSignals], np.ndarray]
    needs_pixels: bool = False
    needs_gradient: bool = False


def _random(signals: VisualSignals) -> np.ndarray:
    from regate_megatron.method.chance import uniform_in_0_1  # needs torch, which reading the table must not

    return uniform_in_0_1(*signals.keys(), seed=signals.seed, step=signals.step).numpy()


def _even(signals: VisualSignals) -> np.ndarray:
    """A lattice over each grid, moved by chance: any number of the best are spread evenly, each place is as likely.

    In whole numbers, which wrap alike on every machine. Chance alone where a grid is not known.
    """
    import numpy as np

    offset_I = (signals.chance() * 2.0**53).astype(np.uint64) << np.uint64(11)
    state_X, lattices, unknown = np.empty(len(signals.medium_X), np.uint64), {}, []
    for own, grid, offset in _each_medium(signals, offset_I):
        if not any(grid):
            unknown.append(own)
            continue
        if grid not in lattices:
            lattices[grid] = _lattice(*grid)
        state_X[own] = lattices[grid][signals.place_X[own]] + offset
    score_X = (state_X >> np.uint64(11)).astype(np.float64) / 2.0**53
    random_X = _random(signals) if unknown else None
    for own in unknown:
        score_X[own] = random_X[own]
    return score_X


def _lattice(frames: int, height: int, width: int) -> np.ndarray:
    """The lattice at every place of a grid; uint64 [N]."""
    import numpy as np

    steps = (0, *_PLANE) if frames == 1 else _SPACE
    frame_T, row_H, column_W = (
        np.arange(count, dtype=np.uint64) * np.uint64(step)
        for count, step in zip((frames, height, width), steps, strict=True)
    )
    return (frame_T[:, None, None] + row_H[:, None] + column_W).reshape(-1)


def _each_medium(signals: VisualSignals, of_I: Iterable) -> Iterator[tuple[slice, tuple[int, ...], Any]]:
    """Which candidates each medium has, its grid, and its own of ``of_I``; of media with candidates."""
    import numpy as np

    count_I, end = np.bincount(signals.medium_X, minlength=len(signals.grid_I3)), 0
    for count, grid_3, own in zip(count_I.tolist(), signals.grid_I3.tolist(), of_I, strict=True):
        if count:
            yield slice(end, end + count), tuple(grid_3), own
        end += count


def _by_medium(signals: VisualSignals, of: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]) -> np.ndarray:
    """``of(pixels, grid)`` [N] of every medium with candidates, at their places."""
    import numpy as np

    score_X = np.empty(len(signals.medium_X))
    for own, grid, medium in _each_medium(signals, range(len(signals.grid_I3))):
        score_X[own] = of(np.asarray(signals.pixels(medium), np.float64), grid)[signals.place_X[own]]
    return score_X


def _static(signals: VisualSignals) -> np.ndarray:
    """1 − cosine with the same place one frame earlier; the first frame comes first. Images: ``even``."""
    import numpy as np

    def changes(pixel_ND: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
        frame_TND = pixel_ND.reshape(grid[0], -1, pixel_ND.shape[1])
        norm_TN = np.sqrt(np.einsum("tnd,tnd->tn", frame_TND, frame_TND))  # a pass each, and nothing in between
        dot_TN = np.einsum("tnd,tnd->tn", frame_TND[1:], frame_TND[:-1])
        norms_TN = norm_TN[1:] * norm_TN[:-1]
        alike_TN = norm_TN[1:] == norm_TN[:-1]  # where one of them is all zero
        cosine_TN = np.divide(dot_TN, norms_TN, out=alike_TN.astype(np.float64), where=norms_TN > 0)
        change_X = 1.0 - cosine_TN.ravel()
        change_X[change_X < _ROUNDING] = 0.0
        return np.concatenate([np.full(norm_TN.shape[1], FIRST_FRAME), change_X])

    moves_X = signals.grid_I3[signals.medium_X, 0] > 1
    if not moves_X.any():
        return _even(signals)
    moving = _only(signals, moves_X)
    score_X = np.empty(len(moves_X))
    score_X[moves_X] = _by_medium(moving, changes)
    if not moves_X.all():
        score_X[~moves_X] = _even(_only(signals, ~moves_X))
    return score_X


def _detail(signals: VisualSignals) -> np.ndarray:
    import numpy as np

    def deviation(pixel_ND: np.ndarray, _: tuple[int, ...]) -> np.ndarray:
        count = pixel_ND.shape[1]
        squares_N = np.einsum("nd,nd->n", pixel_ND, pixel_ND)
        around_N = squares_N - np.einsum("nd->n", pixel_ND) ** 2 / count
        return np.sqrt(np.where(around_N > _ROUNDING * squares_N, around_N, 0.0) / count)

    return _by_medium(signals, deviation)


def _gradient(signals: VisualSignals) -> np.ndarray:
    """What the loss depended on most; samples that no dense step has shown: ``even``, with the same mean."""
    import numpy as np

    is_new_X = np.isnan(signals.gradient_X)
    return np.where(is_new_X, 2 * _even(signals), signals.gradient_X) if is_new_X.any() else signals.gradient_X


def _only(signals: VisualSignals, where_X: np.ndarray) -> VisualSignals:
    """The same for some of the candidates, of known grids: for rules that ask for no keys."""
    return replace(signals, medium_X=signals.medium_X[where_X], place_X=signals.place_X[where_X])


VISUAL_SCORES: dict[str, VisualScore] = {
    "random": VisualScore("chance", _random),
    "even": VisualScore("a lattice over the picture, moved by chance (cells that are not known: random)", _even),
    "static": VisualScore(
        "1 - cosine with the same place one frame earlier, the first frame first; images: even",
        _static,
        needs_pixels=True,
    ),
    "detail": VisualScore("standard deviation of the pixels", _detail, needs_pixels=True),
    "gradient": VisualScore(
        "running average of the gradient's norm where the row is shortened, in dense steps; new samples: even",
        _gradient,
        needs_gradient=True,
    ),
}
