"""Photographs with the captions that people wrote for them, in place of drawings and names.

Of Debian's package `tuxpaint-stamps-default` (GPL-2, never vendored): cut-out photographs of animals, food, plants and
vehicles with captions such as "A green apple." or "An old Chinese sailing ship." Where it is not installed,
`apt-get download` brings it. A picture holds one or two of them, each in a cell of a 2 x 2 grid on a coloured ground,
shifted, scaled and mirrored at random; the answer is the captions as they are, with the place of each, and the ground.

Every word of a caption needs the picture, but some more than others, as in real captions: after "an old Chinese
sailing" text alone knows the ship. Held-out pictures show the same photographs, shifted, scaled and mirrored in ways of
their own.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))

import data as scenes  # the demo's: grounds and corners

PACKAGE = "tuxpaint-stamps-default"
INSTALLED = Path("/usr/share/tuxpaint/stamps")
LICENCE = f"Photographs and captions: Debian's package {PACKAGE}, GPL-2."
GROUPS = ("animals", "food", "plants", "vehicles")
LEFT_OUT = {"cartoon", "toys", "plastic"}  # folders of drawings and of what only looks like it
MOST_WORDS = 5
MOST = 65  # photographs: of all 195 a tower from the seed names less than half after 600 steps
SIZE, POSITIONS = 96, 16  # pixels of a picture's side and its visual positions, unless told otherwise
KINDS = ("small word", "colour", "name", "place")
SMALL = {"a", "an", "the", "of", "and", "with", "in", "for", "your", "some", "this", "is"}
COLOURS = {*scenes.GROUNDS, "red", "orange", "brown", "purple", "black", "gray", "gold", "golden", "silver", "dark"}
INSTRUCTIONS = ("What is in this picture?", "Caption every photograph.")
PAIRS = 0.3  # of the pictures: two photographs
LOOKS = 8  # pictures of the same page, by other chances


class PhotographsError(RuntimeError):
    """The photographs cannot be had; the message says what is missing."""


@dataclass(frozen=True)
class Photograph:
    """A caption without its full stop, and the picture: RGBA, fills a square."""

    caption: str
    art: object


@dataclass(frozen=True)
class Page:
    """Indices of one or two photographs, their cells in reading order, the ground, the instruction, and which look."""

    photographs: tuple[int, ...]
    cells: tuple[int, ...]
    ground: str
    template: int
    look: int = 0

    @property
    def content(self) -> tuple:
        """What no two samples share."""
        return self.photographs, self.cells, self.ground, self.look


def find(folder: Path) -> Path:
    """The package's photographs: installed, or brought to `folder`, where its .deb may lie already.

    Raises:
        PhotographsError: neither.
    """
    if INSTALLED.is_dir():
        return INSTALLED
    brought = folder / PACKAGE
    if not brought.is_dir():
        aside = folder / f"{PACKAGE}.incomplete"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if not list(folder.glob(f"{PACKAGE}_*.deb")):
            run("apt-get", "download", PACKAGE, cwd=aside)
            for package in aside.glob("*.deb"):
                package.rename(folder / package.name)
        run("dpkg-deb", "-x", *map(str, folder.glob(f"{PACKAGE}_*.deb")), str(aside), cwd=folder)
        aside.rename(brought)
    return brought / INSTALLED.relative_to("/")


def run(*command: str, cwd: Path) -> None:
    """One of the package manager's commands."""
    allowed = f"allowed the package {PACKAGE} installed, or one whole .deb of it; install it, or put that into {cwd}"
    if shutil.which(command[0]) is None:
        raise PhotographsError(f"photographs: given a machine without {command[0]}; {allowed}")
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PhotographsError(f"photographs: given {' '.join(command[:2])}, which failed ({last[0]}); {allowed}")


def load(side: int, folder: Path) -> list[Photograph]:
    """MOST photographs with short captions, for cells of `side` pixels, spread over the order of the files' names; one
    per caption.

    Raises:
        PhotographsError: they cannot be had, or are fewer.
    """
    from PIL import Image, ImageOps

    found: dict[str, Photograph] = {}
    stamps = find(folder)
    for file in sorted(file for group in GROUPS for file in (stamps / group).rglob("*.png")):
        text = file.with_suffix(".txt")
        if LEFT_OUT.intersection(file.parts) or not text.exists():
            continue
        caption = text.read_text(errors="replace").partition("\n")[0].strip().removesuffix(".")
        if caption.lower() in found or not re.fullmatch(r"[A-Za-z' -]+", caption) or len(caption.split()) > MOST_WORDS:
            continue
        art = Image.open(file).convert("RGBA")
        art = ImageOps.pad(art.crop(art.getchannel("A").getbbox()), (side, side))
        found[caption.lower()] = Photograph(caption, art)
    if len(found) < MOST:
        raise PhotographsError(
            f"photographs: given {len(found)} with short captions in {stamps}, allowed {MOST} or more; "
            f"change to {PACKAGE} of another release, or remove the folder"
        )
    return [list(found.values())[place * len(found) // MOST] for place in range(MOST)]


def draw(photographs: list[Photograph], rng: random.Random) -> Page:
    """A page by chance."""
    count = 2 if rng.random() < PAIRS else 1
    shown = tuple(rng.sample(range(len(photographs)), count))
    cells = tuple(sorted(rng.sample(range(4), count)))
    ground, template = rng.choice(list(scenes.GROUNDS)), rng.randrange(len(INSTRUCTIONS))
    return Page(shown, cells, ground, template, rng.randrange(LOOKS))


def told(page: Page, photographs: list[Photograph]) -> str:
    """The captions, every word of them marked."""
    marked = [" ".join(f"*{word}*" for word in photographs[index].caption.split()) for index in page.photographs]
    return " ".join(
        f"At the {scenes.CORNERS[cell]}: {caption}." for cell, caption in zip(page.cells, marked, strict=True)
    )


def describe(page: Page, photographs: list[Photograph]) -> tuple[str, str, list[tuple[int, int]]]:
    """The instruction, the answer, and the character spans of the answer that need the picture."""
    answer = f"{told(page, photographs)} The background is *{page.ground}*."
    return INSTRUCTIONS[page.template], *scenes.without_marks(answer)


def short_caption(page: Page, photographs: list[Photograph]) -> tuple[str, str, list[tuple[int, int]]]:
    """The captions, the places and the ground: a start that cannot read grounds learns to at a step of its own luck."""
    return ("Photographs:", *scenes.without_marks(f"{told(page, photographs)} On *{page.ground}*."))


def kind_of(word: str) -> int:
    """1 and up: the place in KINDS of a word that needs the picture."""
    word = word.lower()
    if word in SMALL:
        return 1
    if word in COLOURS:
        return 2
    return 4 if word in ("top", "bottom", "left", "right") else 3


def paint(page: Page, photographs: list[Photograph], rng: random.Random, size: int) -> np.ndarray:
    """The picture [size, size, 3] uint8. `photographs` are of cells of half `size`."""
    from PIL import Image, ImageOps

    side = size // 2
    canvas = Image.new("RGB", (size, size), scenes.GROUNDS[page.ground])
    for index, cell in zip(page.photographs, page.cells, strict=True):
        pixels = rng.randint(side - side // 8, side)
        art = photographs[index].art.resize((pixels, pixels), Image.Resampling.BILINEAR)
        art = ImageOps.mirror(art) if rng.random() < 0.5 else art
        room = side - pixels
        canvas.paste(art, (cell % 2 * side + rng.randint(0, room), cell // 2 * side + rng.randint(0, room)), art)
    return np.asarray(canvas)
