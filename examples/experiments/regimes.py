"""Other training data than the usual, made of it: what an arm's `data` names in arms.toml. Held-out data stay as is.

    few      a quarter of the samples, each four times as often: many epochs, as difficulty wants
    noisy    one caption in ten has words that nobody can predict: a serial number, names, or mistakes
    mixed    a third of the rows has no picture: the caption is part of the prompt, the answer says it in other words

`fresh`, twice as many samples for a single epoch, and `long`, answers four times as long, are made with the usual ones
by captions.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))

import data as scenes  # the demo's

NOISE = 0.1  # of the captions
SERIAL = 6  # pieces of a serial number
TEXT = 1 / 3  # of the rows
REWORDED = 40  # pieces of an answer to text: as long as a caption
OBJECT = 3  # the kind of word that names stand for, see captions.KINDS

Arrays = dict[str, np.ndarray]


def few(train: Arrays, rng: np.random.Generator, data: Path) -> Arrays:
    """A quarter of the rows."""
    return {name: rows[: len(rows) // 4] for name, rows in train.items()}


def noisy(train: Arrays, rng: np.random.Generator, data: Path) -> Arrays:
    """One caption in ten with noise of one of three kinds; its noise counts as text, as no picture tells it."""
    tokens, needs = train["tokens"].copy(), train["needs_image"].copy()
    pieces = np.unique(tokens[:, 1:][train["loss_mask"] > 0])
    words = {kind: tokens[:, 1:][needs == kind] for kind in np.unique(needs[needs > 0])}
    for row in rng.permutation(len(tokens))[: round(NOISE * len(tokens))]:
        answer = np.flatnonzero(train["loss_mask"][row])[:-1]  # without <eos>
        of_picture = answer[needs[row, answer] > 0]
        match rng.integers(3):
            case 0:
                places = answer[-SERIAL:]
                tokens[row, places + 1] = rng.choice(pieces, len(places))
            case 1:
                places = of_picture[needs[row, of_picture] == OBJECT]
                tokens[row, places + 1] = rng.choice(pieces, len(places))
            case _:
                places = of_picture
                tokens[row, places + 1] = [rng.choice(words[kind]) for kind in needs[row, places]]
        needs[row, places] = 0
    return train | {"tokens": tokens, "needs_image": needs}


def mixed(train: Arrays, rng: np.random.Generator, data: Path) -> Arrays:
    """A third of the rows without pictures, of the same captions' long answers, which tell them again and again.

    `has_image` says which rows have one. No word of the others needs a picture: the prompt tells all of it.
    """
    with np.load(data / "long" / "train.npz") as arrays:
        told = {name: arrays[name] for name in ("tokens", "loss_mask")}
    count, length = train["tokens"].shape
    shape = {"tokens": length + REWORDED, "loss_mask": length + REWORDED - 1, "needs_image": length + REWORDED - 1}
    rows = {name: np.zeros((count, most), train[name].dtype) for name, most in shape.items()}
    for name, values in rows.items():
        values[:, : train[name].shape[1]] = train[name]
    has_image = np.ones(count, dtype=np.uint8)
    has_image[rng.permutation(count)[: round(TEXT * count)]] = 0
    for row in np.flatnonzero(has_image == 0):
        end = np.flatnonzero(train["loss_mask"][row])[-1]  # the caption's last piece, which predicted <eos>
        for values in rows.values():
            values[row] = 0
        rows["tokens"][row, : end + 1 + REWORDED] = told["tokens"][row, : end + 1 + REWORDED]
        rows["loss_mask"][row, end : end + REWORDED] = told["loss_mask"][row, end : end + REWORDED]
    return rows | {"images": train["images"], "has_image": has_image}


REGIMES: dict[str, Callable[[Arrays, np.random.Generator, Path], Arrays]] = {"few": few, "noisy": noisy, "mixed": mixed}


def prepare(data: Path, name: str, seed: int) -> Path:
    """The folder of a regime in that of the usual data, made unless it is there; a failed run leaves nothing."""
    target, source = data / name, Path(__file__).read_text()
    if target.exists() and (target / "source").read_text() == source:
        return target
    shutil.rmtree(target, ignore_errors=True)
    with scenes.written_aside(target) as aside:
        (aside / "source").write_text(source)
        with np.load(data / "train.npz") as arrays:
            train = {key: arrays[key] for key in arrays.files}
        np.savez(aside / "train.npz", **REGIMES[name](train, np.random.default_rng((seed, len(name))), data))
        shutil.copy(data / "heldout.npz", aside)
    return target
