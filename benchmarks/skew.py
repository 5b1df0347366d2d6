"""Rows as multimodal training meets them: short and long answers, one to thirty images, text alone, padded or not.

A mix draws rows from a few kinds; every number is a plain assumption, stated in :data:`MIXES`, not measured on a data
set. Lengths are in positions of the merged row, as the decoder sees it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from regate_megatron.method.candidates import Candidates, Sort


@dataclass(frozen=True)
class Kind:
    """One kind of sample.

    Attributes:
        share: how often it occurs.
        images: fewest and most images (or frames), drawn evenly.
        image_length: positions per image.
        prompt: median text context; drawn log-normally with sigma 0.6, as answers are.
        answer: median number of targets.
        spread: sigma of the answer's logarithm.
    """

    share: float
    images: tuple[int, int]
    image_length: int
    prompt: int
    answer: int
    spread: float = 0.8


@dataclass(frozen=True)
class Mix:
    """Kinds of samples, and how they become rows.

    Attributes:
        kinds: what samples are drawn from.
        length: longest row; samples are cut to it, padded rows are as long.
        layout: "padded" (to the longest row), "own" (every row has its own length) or "packed" (samples fill a row).
    """

    kinds: tuple[Kind, ...]
    length: int
    layout: str


MIXES = {
    # one picture, a sentence about it
    "captions": Mix((Kind(1.0, (1, 1), 576, 20, 40),), 1024, "own"),
    # a visual-instruction set: one picture mostly, some with several, some text alone with long answers
    "mixed-instruct": Mix(
        (Kind(0.55, (1, 1), 576, 60, 150), Kind(0.2, (2, 5), 576, 80, 250), Kind(0.25, (0, 0), 0, 150, 500, 1.0)),
        4096,
        "padded",
    ),
    # frames of a clip, questions with short answers and descriptions
    "video": Mix((Kind(0.6, (8, 30), 196, 40, 30), Kind(0.4, (8, 30), 196, 40, 400)), 8192, "padded"),
    # pages to read out or to answer questions on
    "documents": Mix((Kind(0.5, (1, 30), 256, 40, 1500, 1.0), Kind(0.5, (1, 30), 256, 60, 60)), 12288, "own"),
    # the same instruction set, samples packed into rows
    "packed-instruct": Mix(
        (Kind(0.55, (1, 1), 256, 60, 150), Kind(0.2, (2, 5), 256, 80, 250), Kind(0.25, (0, 0), 0, 150, 500, 1.0)),
        8192,
        "packed",
    ),
}


@dataclass(frozen=True)
class Sample:
    """Context positions and targets of one sample; ``visual``: how many of the context each of its images holds."""

    context: int
    targets: int
    visual: tuple[int, ...] = ()


def draw_sample(mix: Mix, rng: np.random.Generator) -> Sample:
    """One sample, cut to the mix's longest row; it has one target at least."""
    kind = mix.kinds[rng.choice(len(mix.kinds), p=[kind.share for kind in mix.kinds])]
    images = int(rng.integers(kind.images[0], kind.images[1] + 1))
    text = int(np.clip(rng.lognormal(np.log(kind.prompt), 0.6), 1, mix.length))
    answer = int(np.clip(rng.lognormal(np.log(kind.answer), kind.spread), 1, mix.length))
    context = min(images * kind.image_length + text, mix.length - 1)
    ends = [min(number * kind.image_length, context) for number in range(images + 1)]
    visual = tuple(end - start for start, end in zip(ends, ends[1:], strict=False) if end > start)
    return Sample(context, min(answer, mix.length - context), visual)


def draw_row(mix: Mix, rng: np.random.Generator) -> list[Sample]:
    """The samples of one row: one, or as many as fit when packed."""
    row = [draw_sample(mix, rng)]
    while mix.layout == "packed":
        used = sum(sample.context + sample.targets for sample in row)
        sample = draw_sample(mix, rng)
        if used + sample.context + sample.targets > mix.length:
            break
        row.append(sample)
    return row


def make_rows(
    mix: Mix,
    samples: list[list[Sample]],
    rng: np.random.Generator,
    keep_ratio: float,
    micro_batch_size: int = 1,
    visual_keep_ratio: float = 1.0,
) -> Candidates:
    """A rank's rows with scores: gamma-distributed losses, some samples harder than others; visual ones by chance."""
    length_R = torch.tensor([sum(s.context + s.targets for s in row) for row in samples])
    if mix.layout != "own":
        length_R = torch.full_like(length_R, mix.length)
    targets = [sample.targets for row in samples for sample in row]
    hardness = np.repeat(rng.lognormal(0, 0.5, len(targets)), targets)
    num_micro = len(samples) // micro_batch_size
    scores = {
        "key_M": torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, num_micro)),
        "score_X": torch.from_numpy(rng.gamma(1.2, 1.2, len(hardness)) * hardness),
    }
    always_R = torch.tensor([sum(s.context for s in row) for row in samples])
    sorts = [
        Sort(
            count_G=torch.tensor(targets),
            row_G=torch.tensor([index for index, row in enumerate(samples) for _ in row]),
            keep_ratio=keep_ratio,
            score_X=scores["score_X"],
        )
    ]
    if visual_keep_ratio < 1.0:
        images = [(index, count) for index, row in enumerate(samples) for s in row for count in s.visual]
        row_G, count_G = torch.tensor(images, dtype=torch.int64).view(-1, 2).unbind(dim=1)
        always_R.index_add_(0, row_G, -count_G)
        score_X = torch.from_numpy(rng.random(int(count_G.sum())))
        sorts.append(Sort(count_G=count_G, row_G=row_G, keep_ratio=visual_keep_ratio, score_X=score_X))
    return Candidates(
        always_R=always_R,
        dense_M=length_R.view(num_micro, -1).amax(dim=1),
        key_M=scores["key_M"],
        sorts=tuple(sorts),
    )
