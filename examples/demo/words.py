"""What was kept, word by word: of training samples from the trace, of held-out samples from the final model's losses.

Captions are cut into the tokenizer's pieces; with this vocabulary nearly every word is one piece.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from counts import read_trace
from dataset import IMAGE_TOKEN, Captions

from regate_megatron.batches.facts import key_hex
from regate_megatron.batches.llava import LLaVABatches
from regate_megatron.method.candidates import ceil_share

SPACE = "\u2581"  # SentencePiece's mark of a piece that begins a word
EVERY_PATCH = np.ones((1, 1), bool)


@dataclass(frozen=True)
class Piece:
    """One piece of a caption; `score` is None and `is_kept` True where it is no target."""

    text: str
    begins_word: bool
    is_target: bool
    needs_image: bool
    is_kept: bool
    score: float | None


@dataclass(frozen=True)
class Caption:
    """One sample, its picture [H, W, 3] uint8, and which of its patches ran, bool [rows, columns]."""

    image: np.ndarray
    pieces: list[Piece]
    has_run: np.ndarray


class Samples:
    """The rows of one file of data.py with their text."""

    def __init__(self, data: Path, part: str):
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
        with np.load(data / f"{part}.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.entries = Captions(data / f"{part}.npz", len(self.arrays["tokens"]), with_image=True)

    def caption(self, row: int, score: dict[int, float], kept: set[int], has_run: np.ndarray = EVERY_PATCH) -> Caption:
        """The caption of a row; `score` and `kept` are by the number of the label, 0 for the first."""
        pieces = []
        for label, token in enumerate(self.arrays["tokens"][row][1:].tolist()):
            text = self.tokenizer.id_to_piece(token)
            if self.tokenizer.is_control(token):  # <eos> is a target without text, <pad> is none
                continue
            is_target = bool(self.arrays["loss_mask"][row][label])
            needs_image, is_kept = bool(self.arrays["needs_image"][row][label]), not is_target or label in kept
            begins = text.startswith(SPACE)
            pieces.append(Piece(text.lstrip(SPACE), begins, is_target, needs_image, is_kept, score.get(label)))
        return Caption(self.arrays["images"][row], pieces, has_run)

    def rows_by_key(self, image_length: int) -> dict[str, int]:
        """Row of the file by the key that stands for the sample in a trace."""
        adapter = LLaVABatches(
            image_length=image_length, image_token=IMAGE_TOKEN, max_length=1 << 20, pads_to_max=False
        )
        result = {}
        for row in range(len(self.entries)):
            batch = {name: value[None] for name, value in self.entries[row].items()}
            result[key_hex(adapter.read(batch).difficulty_key_N2[0])] = row
        return result


def kept_in_training(samples: Samples, trace: Path) -> list[tuple[int, Caption]]:
    """Iteration and caption of every row of every sparse step of a trace."""
    records = [record for record in read_trace(trace) if record["phase"] == "sparse" and not record["fallback"]]
    # A merged row is the picture's positions, then the text without its placeholder; a position predicts the next.
    num_visual = records[0]["dense_length"] - (samples.arrays["tokens"].shape[1] - 1)
    rows, side, result = samples.rows_by_key(num_visual), math.isqrt(num_visual), []
    for record in records:
        for row in record["rows"]:
            score = {int(position) - num_visual: value for position, value in row["scores"].items()}
            kept = {position - num_visual for position in row["kept"]}
            patches = np.array([place - num_visual in kept for place in range(num_visual)]).reshape(side, side)
            result.append((record["iteration"], samples.caption(rows[row["sample_key"]], score, kept, patches)))
    return result


def kept_if_trained(samples: Samples, losses: Path, reference: Path, keep_ratio: float) -> list[Caption]:
    """What ReGATE would keep of held-out samples: no training step ever sees them, so their difficulty is one loss.

    Args:
        losses: the trained model's loss of every token, written by train.py --eval-losses.
        reference: the teacher's, likewise (of the text alone, as the teacher reads it).
    """
    label_NT = samples.arrays["tokens"][:, 1:]
    with np.load(losses) as student, np.load(reference) as teacher:
        assert (student["labels"][:, 1:] == label_NT).all() and (teacher["labels"] == label_NT).all()
        student_NT, teacher_NT = torch.from_numpy(student["losses"][:, 1:]), torch.from_numpy(teacher["losses"])
    score_NT = student_NT.double() + 0.5 * teacher_NT.double()  # the printed score
    is_target_NT = torch.from_numpy(samples.arrays["loss_mask"] > 0)
    num_keep_N = ceil_share(keep_ratio, is_target_NT.sum(dim=1))
    best_first_NT = score_NT.where(is_target_NT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    kept_NT = is_target_NT & (best_first_NT.argsort(dim=1) < num_keep_N[:, None])
    return [
        samples.caption(row, dict(enumerate(score_NT[row].tolist())), set(torch.where(kept_NT[row])[0].tolist()))
        for row in range(len(label_NT))
    ]


def one_per_instruction(captions: list[Caption], count: int, seed: int = 1) -> list[Caption]:
    """`count` captions, their instructions as different as can be; drawn by seed, not chosen."""
    by_instruction: dict[str, list[Caption]] = defaultdict(list)
    for caption in captions:
        by_instruction[" ".join(piece.text for piece in caption.pieces if not piece.is_target)].append(caption)
    rng = random.Random(seed)
    groups = [rng.sample(group, len(group)) for _, group in sorted(by_instruction.items())]
    return [groups[i % len(groups)][i // len(groups)] for i in range(count)]


def share_kept(captions: list[Caption]) -> dict[str, float]:
    """Of all targets with text: the share kept among those that need the image, and among the others."""
    targets = [piece for caption in captions for piece in caption.pieces if piece.is_target]
    groups = {"needs_image": [p for p in targets if p.needs_image], "others": [p for p in targets if not p.needs_image]}
    return {name: sum(p.is_kept for p in group) / len(group) for name, group in groups.items()}


def words_by_share(captions: list[Caption], least: int) -> list[tuple[str, float, int]]:
    """(word, share of its pieces kept, occurrences), most often kept first; words that occur `least` times or more."""
    kept: dict[str, list[float]] = defaultdict(list)
    for caption in captions:
        word: list[Piece] = []
        for piece in [*caption.pieces, Piece("", True, False, False, True, None)]:
            if piece.begins_word or not piece.text[:1].isalnum():
                if word:
                    text = "".join(p.text for p in word).strip(".,").lower()
                    kept[text].append(sum(p.is_kept for p in word) / len(word))
                word = []
            if piece.is_target and piece.text[:1].isalnum():
                word.append(piece)
    result = [(word, sum(values) / len(values), len(values)) for word, values in kept.items() if len(values) >= least]
    return sorted(result, key=lambda entry: (-entry[1], -entry[2], entry[0]))
