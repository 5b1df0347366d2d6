"""Pictures and captions in the tokens of a pretrained language model, its vocabulary cut to those in use.

Files in the folder: `train.npz` and `heldout.npz` as examples/demo/data.py writes them, but with the kind of word in
`needs_image` (0: text predicts it; 1 and up: the kinds of that sort of pictures); `fresh/`, the same with
`fresh_factor` times as many training samples, the first of them the same; `long/`, the usual samples with long answers;
`align/`, all of these with short captions, for the stage that teaches the vision tower to speak to the language model;
`vocabulary.json`, the model's own id of every id used here; `about.json`.

A vocabulary of 32,000 or more would spend most of a small machine's time in the LM head, on pieces that no caption
has. Rows of the embedding are taken as they are, so that the weights stay the pretrained ones.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.append(str(DEMO))

import clips  # noqa: E402
import data as scenes  # noqa: E402  the demo's: what is drawn and said
import photographs  # noqa: E402

KINDS = ("count", "colour", "object", "place")
PLACES = {"at", "on", "in", "top", "bottom", "left", "right"}
COLOURS = {*scenes.GROUNDS, "red", "orange", "brown", "purple", "black"}


def kind_of(word: str) -> int:
    """1 and up: the place in KINDS of a word that needs the picture."""
    if word in scenes.NUMBERS or word in ("a", "the"):
        return 1
    if word in COLOURS:
        return 2
    return 4 if word in PLACES else 3


def encode(
    tokenizer: Tokenizer, sample: tuple, bos: int, eos: int, kind_of: Callable[[str], int] = kind_of
) -> tuple[list[int], list[int], list[int]]:
    """`<bos> instruction answer <eos>` in the model's own ids; per token whether it is a target, and the kind of word.

    Only the first piece of a word that needs the picture has a kind: it tells the others.
    """
    instruction, answer, spans = sample
    space = "" if tokenizer.normalizer else " "  # byte-level vocabularies put no space before the first word
    prompt = [bos, *tokenizer.encode(instruction, add_special_tokens=False).ids]
    coded = tokenizer.encode(space + answer, add_special_tokens=False)
    kinds, last = [], None
    for begin, end in coded.offsets:
        begin, end = begin - len(space), end - len(space)
        span = next((s for s in spans if begin < s[1] and end > s[0]), None)
        kinds.append(kind_of(answer[slice(*span)]) if span and span != last else 0)
        last = span or last
    return prompt + coded.ids + [eos], [0] * len(prompt) + [1] * (len(coded.ids) + 1), [0] * len(prompt) + kinds + [0]


def prepare(
    out: Path,
    language_model: Path,
    *,
    num_train: int,
    num_heldout: int,
    fresh_factor: int,
    sort: str,
    size: int,
    seed: int,
) -> Path:
    """Write all files into `out` unless they are there; a failed run leaves nothing. Returns `out`.

    `sort`: of pictures, one of SORTS; `size`: their height and width in pixels, an even number.
    """
    wanted = {"num_train": num_train, "num_heldout": num_heldout, "fresh_factor": fresh_factor, "seed": seed}
    wanted |= {"sort": sort, "size": size, "language_model": language_model.name}
    of = SORTS[sort]
    sources = {Path(__file__), DEMO / "data.py", Path(sys.modules[of.draw.__module__].__file__)}
    wanted["source"] = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources))).hexdigest()
    if (out / "about.json").exists() and wanted.items() <= json.loads((out / "about.json").read_text()).items():
        return out
    with scenes.written_aside(out) as aside:
        rng = random.Random(seed)
        parts = of.load(size // 2, out.parent / "photographs")
        drawn: dict[tuple, object] = {}
        while len(drawn) < fresh_factor * num_train + num_heldout:
            scene = of.draw(parts, rng)
            drawn.setdefault(of.content(scene), scene)  # no two are alike
        config = json.loads((language_model / "config.json").read_text())
        special = [int(config[name]) for name in ("bos_token_id", "eos_token_id")]
        tokenizer = Tokenizer.from_file(str(language_model / "tokenizer.json"))

        def told(by: Callable) -> list[tuple[list[int], list[int], list[int]]]:
            return [encode(tokenizer, by(scene, parts), *special, of.kind_of) for scene in drawn.values()]

        usual, short = told(of.describe), told(of.short_caption)
        vocabulary = sorted(set(special).union(*(tokens for tokens, _, _ in usual + short)))
        pictures = tqdm(drawn.values(), desc="painting pictures", unit="picture", mininterval=1, disable=None)
        images = np.stack([of.paint(scene, parts, rng, size) for scene in pictures])
        heldout, train, rest = slice(num_heldout), slice(num_heldout, num_heldout + num_train), slice(num_heldout, None)
        for folder in ("fresh", "align", *(["long"] if of.long_caption else [])):
            (aside / folder).mkdir()
        usual, short = padded(usual, vocabulary), padded(short, vocabulary)
        if of.long_caption:
            long = padded(told(of.long_caption)[: num_heldout + num_train], vocabulary)
            write(aside / "long", long, images[: num_heldout + num_train], heldout=heldout, train=train)
        write(aside, usual, images, heldout=heldout, train=train)
        write(aside / "fresh", usual, images, heldout=heldout, train=rest)
        write(aside / "align", short, images, heldout=heldout, train=rest)
        _, target, kind = usual
        (aside / "vocabulary.json").write_text(json.dumps(vocabulary))
        shares = [round(float((kind == k).sum() / target.sum()), 3) for k in range(1, len(of.kinds) + 1)]
        about = wanted | {
            "licence": of.licence,
            "num_parts": len(parts),
            "vocabulary": len(vocabulary),
            "targets_per_sample": round(float(target.sum(1).mean()), 2),
            "kinds": of.kinds,
            "share_of_targets_by_kind": shares,
            "content": hashlib.sha256(images.tobytes() + usual[0].tobytes()).hexdigest()[:16],
        }
        (aside / "about.json").write_text(json.dumps(about, indent=1))
    return out


def short_caption(scene: scenes.Scene, emoji: list[scenes.Emoji]) -> tuple:
    """What and where, and the ground: nearly every word needs the picture."""
    return ("Picture:", *scenes.without_marks(f"{scenes.phrase(scene, emoji)} on *{scene.ground}*"))


def long_caption(scene: scenes.Scene, emoji: list[scenes.Emoji]) -> tuple:
    """The caption, and all of it again in the words of the other templates: what was said once, text predicts."""
    instruction, answer, spans = scenes.describe(scene, emoji)
    others = ((scene.template + step) % len(scenes.TEMPLATES) for step in range(1, len(scenes.TEMPLATES)))
    again = [scenes.describe(replace(scene, template=template), emoji)[1] for template in others]
    return instruction, " ".join([answer, *again]), spans


@dataclass(frozen=True)
class Sort:
    """One sort of pictures: what they are made of, drawn by chance, said in words and painted.

    `load` takes a cell's pixels and a folder that downloads may lie in; what it returns goes to the others.
    `long_caption` is None where a caption is told in one way alone.
    `judged`: the kind of word by which starts are judged.
    """

    load: Callable[[int, Path], list]
    draw: Callable[[list, random.Random], object]
    describe: Callable[[object, list], tuple]
    short_caption: Callable[[object, list], tuple]
    paint: Callable[[object, list, random.Random, int], np.ndarray]
    content: Callable[[object], tuple]  # what no two samples share
    kinds: tuple[str, ...]
    licence: str
    kind_of: Callable[[str], int] = kind_of
    long_caption: Callable[[object, list], tuple] | None = None
    frames: int = 1
    judged: int = KINDS.index("object") + 1


def load_drawings(side: int, _: Path) -> list[scenes.Emoji]:
    """The demo's."""
    return scenes.load_emoji(side)


SORTS = {
    "drawings": Sort(
        load_drawings,
        scenes.draw_scene,
        scenes.describe,
        short_caption,
        scenes.paint,
        lambda scene: (scene.parts, scene.ground),
        KINDS,
        scenes.LICENCE,
        long_caption=long_caption,
    ),
    "clips": Sort(
        load_drawings,
        clips.draw,
        clips.describe,
        clips.short_caption,
        clips.paint,
        lambda clip: clip.content,
        ("order", *KINDS[1:]),
        scenes.LICENCE,
        frames=clips.FRAMES,
    ),
    "photographs": Sort(
        photographs.load,
        photographs.draw,
        photographs.describe,
        photographs.short_caption,
        photographs.paint,
        lambda page: page.content,
        photographs.KINDS,
        photographs.LICENCE,
        kind_of=photographs.kind_of,
        judged=photographs.KINDS.index("name") + 1,
    ),
}


def padded(rows: list, vocabulary: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens in ids of the cut vocabulary, targets, kinds of words; int32 [N, S + 1] each."""
    new_id = {old: new for new, old in enumerate(vocabulary)}
    length = max(len(tokens) for tokens, _, _ in rows)
    tokens, target, kind = (np.zeros((len(rows), length), dtype=np.int32) for _ in range(3))
    for i, (row, is_target, kinds) in enumerate(rows):
        tokens[i, : len(row)] = [new_id[token] for token in row]
        target[i, : len(row)], kind[i, : len(row)] = is_target, kinds
    return tokens, target, kind


def write(folder: Path, rows: tuple, images: np.ndarray, **parts: slice) -> None:
    """One file per part."""
    tokens, target, kind = rows
    for name, part in parts.items():
        masks = {"loss_mask": target[part, 1:].astype(np.uint8), "needs_image": kind[part, 1:].astype(np.uint8)}
        np.savez(folder / f"{name}.npz", images=images[part], tokens=tokens[part], **masks)


def cut_vocabulary(language_model: Path, data: Path, target: Path) -> None:
    """Write the language model with only the embedding's rows of `data`'s vocabulary."""
    ids = json.loads((data / "vocabulary.json").read_text())
    config = json.loads((language_model / "config.json").read_text())
    tensors = load_file(language_model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][ids].contiguous()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    special = {name: ids.index(int(config[name])) for name in ("bos_token_id", "eos_token_id")}
    (target / "config.json").write_text(json.dumps(config | special | {"vocab_size": len(ids)}, indent=1))
