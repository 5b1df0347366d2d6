"""Short clips of moving drawings with captions that tell what happens first: the demo's drawings, eight frames each.

One drawing is there from the start and moves to another corner; a second one comes later, or earlier, into a third. A
caption such as "First *a* *blue* *penguin* comes *at* ..., then the *red* *apple* moves ..." has, beside objects,
colours and places, one word that only the order of the frames tells: *a*, where the one that comes is first, or *the*.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))

import data as scenes  # the demo's: what is drawn and said

FRAMES = 8
INSTRUCTIONS = ("What happens in this clip?", "Tell me what happens, in order.")


@dataclass(frozen=True)
class Clip:
    """What happens: emoji indices of the one that moves and the one that comes; cells from, to, at; frames of both."""

    mover: int
    comer: int
    cells: tuple[int, int, int]
    moves_at: int
    comes_at: int
    ground: str
    template: int

    @property
    def content(self) -> tuple:
        """What no two samples share."""
        return self.mover, self.comer, self.cells, self.moves_at < self.comes_at, self.ground


def draw(emoji: list[scenes.Emoji], rng: random.Random) -> Clip:
    """A clip by chance; in half of them the move is first."""
    mover, comer = rng.sample(range(len(emoji)), 2)
    first, second = sorted(rng.sample(range(1, FRAMES), 2))
    moves_at, comes_at = (first, second) if rng.random() < 0.5 else (second, first)
    ground, template = rng.choice(list(scenes.GROUNDS)), rng.randrange(len(INSTRUCTIONS))
    return Clip(mover, comer, tuple(rng.sample(range(4), 3)), moves_at, comes_at, ground, template)


def describe(clip: Clip, emoji: list[scenes.Emoji]) -> tuple[str, str, list[tuple[int, int]]]:
    """The instruction, the answer, and the character spans of the answer that need the clip."""
    mover, comer = emoji[clip.mover], emoji[clip.comer]
    start, end, at = (scenes.CORNERS[cell] for cell in clip.cells)
    moves = f"*{mover.colour}* *{mover.name}* moves from the {start} to the {end}"
    comes = f"*{comer.colour}* *{comer.name}* comes to the {at}"
    moves_first = clip.moves_at < clip.comes_at
    told = f"First *the* {moves}, then a {comes}" if moves_first else f"First *a* {comes}, then the {moves}"
    return INSTRUCTIONS[clip.template], *scenes.without_marks(f"{told}. The background is *{clip.ground}*.")


def short_caption(clip: Clip, emoji: list[scenes.Emoji]) -> tuple[str, str, list[tuple[int, int]]]:
    """What is there at the end, and where."""
    parts = sorted(((clip.mover, (clip.cells[1],)), (clip.comer, (clip.cells[2],))), key=lambda part: part[1])
    scene = scenes.Scene(tuple(parts), clip.ground, 0)
    return ("Clip:", *scenes.without_marks(f"{scenes.phrase(scene, emoji)} on *{clip.ground}*"))


def paint(clip: Clip, emoji: list[scenes.Emoji], rng: random.Random, size: int) -> np.ndarray:
    """The frames [T, size, size, 3] uint8; drawings keep their size. `emoji` is of cells of half `size`."""
    from PIL import Image, ImageOps

    side = size // 2
    drawn = []
    for index in (clip.mover, clip.comer):
        pixels = rng.randint(side - side // 8, side)
        art = emoji[index].art.resize((pixels, pixels), Image.Resampling.BILINEAR)
        drawn.append((ImageOps.mirror(art) if rng.random() < 0.5 else art, rng.randint(0, side - pixels)))
    frames = []
    for frame in range(FRAMES):
        canvas = Image.new("RGB", (size, size), scenes.GROUNDS[clip.ground])
        cells = clip.cells[frame >= clip.moves_at], clip.cells[2] if frame >= clip.comes_at else None
        for (art, shift), cell in zip(drawn, cells, strict=True):
            if cell is not None:
                canvas.paste(art, (cell % 2 * side + shift, cell // 2 * side + shift), art)
        frames.append(np.asarray(canvas))
    return np.stack(frames)
