"""What settings are called, what they take, and how a field of them is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

SHARES = ("sample", "batch")
DENSE_AT = ("start", "random")
DIFFICULTIES = ("own", "kind")
FUSIONS = ("sum", "convex")
BUDGETS = ("uniform", "balanced", "per-sample", "dealt")
PACKED_RATIOS = ("row", "sample")
CONTEXTS = ("all", "read")
SAMPLE_KEYS = ("content", "text")
TEACHER_VISUAL = ("drop", "pad")
STUDENT_AS_TEACHER = "student"

WORDS = (
    "ReGATE: reference-guided adaptive token elision. In a dense step every token runs through the decoder; in a "
    "sparse step some answer tokens or visual positions are left out. An answer token (or target) is one with a loss, "
    "a visual position a token of a picture. The student is the model that is trained, the teacher a frozen language "
    "model that sees the text alone."
)
"""What the help texts take for known."""


def option(default: Any, help_text: str, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices, "metavar": metavar})


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--regate" if name == "enabled" else "--regate-" + name.replace("_", "-")


def shown_default(field: dataclasses.Field) -> str:
    """The default of a field, for help texts and tables."""
    if isinstance(field.default, bool):
        return "off"  # ``enabled`` is on in Python; as a flag it is off until given
    return "none" if field.default is None else str(field.default)
