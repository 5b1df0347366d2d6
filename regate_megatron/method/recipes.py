"""Settings by name: each row of :data:`RECIPES` is a set of values, and what speaks for it. Flags beside it win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        values: of fields of :class:`~regate_megatron.config.ReGateConfig`.
        purpose, evidence: for people.
    """

    values: Mapping[str, Any]
    purpose: str
    evidence: str


# All that steers what runs, so that it stays what it is when defaults move.
_PAPER = {
    "keep_ratio": 0.5,
    "keep_ratio_end": None,
    "keep_ratio_steps": None,
    "share": "sample",
    "least_score": None,
    "visual_keep_ratio": 1.0,
    "visual_score": "random",
    "dense_layers": 1,
    "dense_last_layers": 0,
    "warmup_steps": 100,
    "cycle_steps": 128,
    "dense_steps": 16,
    "dense_at": "start",
    "dense_from": None,
    "ema_decay": 0.9,
    "difficulty": "own",
    "reference_weight": 0.5,
    "fusion": "sum",
    "score": "regate",
    "budget": "uniform",
    "packed_ratio": "sample",
    "context": "all",
    "teacher_visual": "drop",
}

RECIPES: dict[str, Recipe] = {
    "paper": Recipe(
        _PAPER,
        "the paper's score, ratio and schedule; not its lengths ('uniform' keeps more where rows have room) and one "
        "dense layer; as printed: add --regate-budget per-sample --regate-dense-layers 0",
        "arXiv 2507.21420: 41 % fewer answer tokens at equal accuracy or better; here no better than random elision",
    ),
    "pictures": Recipe(
        {"keep_ratio": 1.0, "visual_keep_ratio": 0.25, "visual_score": "even"},
        "rows that are mostly pictures or clips: a quarter of their positions, evenly spread; every target, no "
        "teacher; half of the targets too: add --regate-keep-ratio 0.5 and a teacher",
        "docs/learning.md, pictures of 144 positions, three seeds: 1.2 points behind dense with 61 % of the decoder's "
        "work, 2.3 ahead of dense in the same time; with half of the targets 2.2 behind with 55 %, 1.5 ahead",
    ),
}
