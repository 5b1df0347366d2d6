"""The settings of ReGATE, and the only source of its command-line flags.

Every field of :class:`ReGateConfig` becomes one flag ``--regate-<name-with-dashes>``; ``enabled`` is ``--regate``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.method.schedule import Schedule, drawn_ratio, keep_ratio_of, least_ratio
from regate_megatron.method.scores import SCORES
from regate_megatron.method.visual_scores import VISUAL_SCORES

FUSIONS = ("sum", "convex")
BUDGETS = ("uniform", "balanced", "per-sample", "dealt")
PACKED_RATIOS = ("row", "sample")
CONTEXTS = ("all", "read")
SAMPLE_KEYS = ("content", "text")
TEACHER_VISUAL = ("drop", "pad")
STUDENT_AS_TEACHER = "student"

WORDS = (
    "ReGATE: reference-guided adaptive token elision. In a dense step every token runs through the decoder; in a "
    "sparse step some answer tokens are left out. An answer token (or target) is one with a loss. The student is the "
    "model that is trained, the teacher a frozen language model that sees the text alone."
)
"""What the help texts take for known."""


def _option(default: Any, help_text: str, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices, "metavar": metavar})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReGateConfig:
    """All settings, complete and checked once constructed.

    Raises:
        ReGateError: a value is out of its range; one line with what was given, what is allowed, what to change.
    """

    enabled: bool = _option(True, "train with ReGATE: in sparse steps easy answer tokens are left out of the decoder")
    keep_ratio: float = _option(
        0.5,
        "share of the answer tokens that runs in a sparse step: above 0, at most 1; 1 leaves nothing out",
        metavar="P",
    )
    keep_ratio_end: float | None = _option(
        None,
        "let the keep ratio move from P to R, up or down, a little with every cycle; needs the next flag too; none: it "
        "stays P",
        metavar="R",
    )
    keep_ratio_steps: int | None = _option(
        None,
        "iterations from the end of the warm-up until the keep ratio, or that of visual tokens, has moved from P to R",
        metavar="N",
    )
    visual_keep_ratio: float = _option(
        1.0,
        "share of the visual tokens of each image or video that runs in a sparse step: above 0, at most 1; 1 leaves "
        "none out; with --regate-keep-ratio 1 beside it no teacher is needed",
        metavar="P",
    )
    visual_keep_ratio_end: float | None = _option(
        None, "let the visual keep ratio move from P to R likewise, over as many iterations", metavar="R"
    )
    visual_keep_ratio_spread: float = _option(
        0.0,
        "draw the visual keep ratio of every sparse step from a Beta distribution around P, its standard deviation S "
        "times that of all or nothing: 0 or more, below 1; 0: no draw",
        metavar="S",
    )
    visual_score: str = _option(
        "random",
        "which visual tokens run in sparse steps, those with the highest score; "
        + ", ".join(f"{name}: {row.formula}" for name, row in VISUAL_SCORES.items()),
        tuple(VISUAL_SCORES),
    )
    dense_layers: int = _option(
        1,
        "the first N decoder layers run every token in sparse steps too; 0 is the paper's method; in a HybridModel "
        "attention and MLP are layers of their own",
        metavar="N",
    )
    dense_last_layers: int = _option(
        0, "the last N decoder layers run every token again; not with pipeline parallelism", metavar="N"
    )
    warmup_steps: int = _option(100, "the first N iterations of training are dense", metavar="N")
    cycle_steps: int = _option(
        128, "after the warm-up, iterations come in cycles of N: first dense ones, then sparse ones", metavar="N"
    )
    dense_steps: int = _option(
        16,
        "the first N iterations of each cycle are dense: the student's loss on every answer token is seen again",
        metavar="N",
    )
    dense_from: int | None = _option(
        None,
        "all iterations after the first N are dense, so that training ends on full rows, as evaluation has them; none: "
        "cycles go on to the end",
        metavar="N",
    )
    ema_decay: float = _option(
        0.9,
        "how slowly m, the running average of the student's loss on an answer token, changes: m = B*m + (1-B)*loss; "
        "0 or more, below 1",
        metavar="B",
    )
    reference_weight: float = _option(
        0.5,
        "weight of the teacher's loss in the score 'regate': 0 or more; with --regate-fusion convex at most 1",
        metavar="L",
    )
    fusion: str = _option(
        "sum",
        "how the score 'regate' is made of m, the student's average loss, and ref, the teacher's loss; sum: m + L*ref, "
        "convex: (1-L)*m + L*ref, L the reference weight",
        FUSIONS,
    )
    score: str = _option(
        "regate",
        "which answer tokens run in sparse steps, those with the highest score; "
        + ", ".join(f"{name}: {row.formula}" for name, row in SCORES.items())
        + "; m is the student's average loss on the token, ref the teacher's loss",
        tuple(SCORES),
    )
    budget: str = _option(
        "uniform",
        "how long rows are in a sparse step; uniform: all rows of all ranks alike, balanced: every data-parallel rank "
        "runs the same total, per-sample: every sample keeps exactly its share, and ranks differ, dealt: so too, but "
        "microbatches go to the ranks that their lengths ask for",
        BUDGETS,
    )
    length_multiple: int | None = _option(
        None,
        "lengths of shortened rows are rounded up to a multiple of N, so that few different ones occur; none: N is the "
        "largest power of two up to 1/32 of the full length; what parallelism or FP8 need is seen to without this",
        metavar="N",
    )
    packed_ratio: str = _option(
        "sample",
        "what the keep ratio is a share of where a row holds several packed samples; sample: of the answer tokens of "
        "each sample, row: of all answer tokens of the row",
        PACKED_RATIOS,
    )
    context: str = _option(
        "all",
        "which other tokens run (prompt, images); all: all of them, read: those before the last answer token of their "
        "sample, as no answer token can read the rest",
        CONTEXTS,
    )
    teacher_load: str | None = _option(
        None,
        "the teacher: a folder with a Megatron torch_dist checkpoint of the language model the student started from, "
        "or 'student' for the student's own language model as it is when training starts",
        metavar="DIR|student",
    )
    teacher_visual: str = _option(
        "drop",
        "what the teacher, which sees no images, reads in their place; drop: nothing, its rows are shorter, pad: one "
        "pad token per position",
        TEACHER_VISUAL,
    )
    reference_cache: str | None = _option(
        None,
        "keep the teacher's losses in folder DIR for later runs; a run that finds all it needs there builds no teacher",
        metavar="DIR",
    )
    teacher_offload: bool = _option(False, "keep the teacher's weights in host memory while it does not run")
    sample_key: str = _option(
        "content",
        "how a sample is recognised when it comes again, so that its answer tokens keep their average losses; content: "
        "by its text and pictures, text: by its text alone (for augmented pictures), NAME: by the id under that key of "
        "the batch",
        metavar="{content,text}|NAME",
    )
    difficulty_memory: float = _option(
        4.0,
        "host memory for the student's average losses (and gradients, where visual tokens are ranked by them), in GB "
        "(10^9 bytes) per data-parallel replica; when it is full, the samples seen longest ago are forgotten",
        metavar="GB",
    )
    reset_difficulty: bool = _option(
        False, "resume without the student's average losses that the checkpoint holds: start to learn them anew"
    )
    trace: str | None = _option(
        None, "write one JSON line per microbatch into folder DIR: which tokens ran, with all scores", metavar="DIR"
    )
    seed: int = _option(1234, "seed of all that is drawn by chance: scores, ratios", metavar="N")

    def __post_init__(self) -> None:
        self._check_number("keep_ratio", "a number above 0, at most 1", lambda v: 0 < v <= 1, "0.5")
        self._check_number("visual_keep_ratio", "a number above 0, at most 1", lambda v: 0 < v <= 1, "0.25")
        self._check_number("visual_keep_ratio_spread", "a number of 0 or more, below 1", lambda v: 0 <= v < 1, "0.5")
        self._check_number("ema_decay", "a number of 0 or more, below 1", lambda v: 0 <= v < 1, "0.9")
        top = 1.0 if self.fusion == "convex" else math.inf
        allowed = (
            f"a number from 0 to 1 with {flag('fusion')} convex" if self.fusion == "convex" else "a number of 0 or more"
        )
        self._check_number("reference_weight", allowed, lambda v: 0 <= v <= top, "0.5")
        for name in ("dense_layers", "dense_last_layers", "warmup_steps", "dense_steps"):
            self._check_number(name, "an integer of 0 or more", lambda v: v >= 0, "1", True)
        self._check_number("cycle_steps", "an integer of 1 or more", lambda v: v >= 1, "128", True)
        if self.length_multiple is not None:
            self._check_number("length_multiple", "an integer of 1 or more", lambda v: v >= 1, "64", True)
        self._check_number("seed", "an integer of 0 or more, below 2**63", lambda v: 0 <= v < 2**63, "1234", True)
        self._check_number("difficulty_memory", "a number above 0 (of 10^9 bytes)", lambda v: v > 0, "4")
        if not isinstance(self.sample_key, str) or not self.sample_key.strip():
            raise self._refuse("sample_key", f"{', '.join(SAMPLE_KEYS)}, or a key of the batch", "it to content")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise self._refuse(field.name, "one of " + ", ".join(choices), f"it to {choices[0]}")
        if self.dense_steps > self.cycle_steps:
            raise self._refuse(
                "dense_steps",
                f"0 to {self.cycle_steps}, the length of a cycle",
                f"it to {min(16, self.cycle_steps)} or raise {flag('cycle_steps')}",
            )
        self._check_moving_ratio()
        if self.dense_from is not None:
            least = self.warmup_steps + 1
            allowed = f"none, or an integer of {least} or more (after the warm-up)"
            self._check_number("dense_from", allowed, lambda v: v >= least, str(least), True)
        self._check_learns()

    def _check_learns(self) -> None:
        """Refuse a score of the student's losses alone where no step ever shows those of elided targets.

        All would start with one score, so the first targets of each row would be kept, and kept for ever. (A ratio that
        starts at 1 shows all losses in its first cycle; a cool-down comes when nothing is elided any more. With
        reference losses beside them targets do differ.) Likewise a score of gradients that no step shows.
        """
        dense = self.warmup_steps or self.dense_steps
        if self.enabled and self.learns_gradients and not dense:
            more = f"{flag('warmup_steps')} or {flag('dense_steps')} to 1 or more"
            given = f"{self.visual_score} with {flag('warmup_steps')} 0 and {flag('dense_steps')} 0"
            allowed = "dense steps, which alone show gradients"
            raise refuse(flag("visual_score"), given=given, allowed=allowed, change=f"{more}, or it to even")
        shows = dense or self.keep_ratio == 1.0
        needs_reference = self.needs_teacher and (self.score != "regate" or self.reference_weight)
        is_alone = self.learns_losses and not needs_reference
        if self.enabled and is_alone and not shows:
            given = f"{self.score} with {flag('warmup_steps')} 0 and {flag('dense_steps')} 0"
            if self.score == "regate":
                given += f" and {flag('reference_weight')} 0"
            raise refuse(
                flag("score"),
                given=given,
                allowed="a score that differs from target to target before any loss is known",
                change=f"{flag('warmup_steps')} or {flag('dense_steps')} to 1 or more, or {flag('score')} to reference",
            )

    def _check_moving_ratio(self) -> None:
        ends = [name for name in ("keep_ratio_end", "visual_keep_ratio_end") if getattr(self, name) is not None]
        for name in ends:
            self._check_number(name, "none, or a number above 0, at most 1", lambda v: 0 < v <= 1, "0.5")
        if self.keep_ratio_steps is not None:
            allowed = "none, or an integer of 1 or more"
            self._check_number("keep_ratio_steps", allowed, lambda v: v >= 1, "1000", True)
        if bool(ends) != (self.keep_ratio_steps is not None):
            given, missing = (ends[0], "keep_ratio_steps") if ends else ("keep_ratio_steps", "keep_ratio_end")
            needed = "the ratio to move to" if missing == "keep_ratio_end" else "a number of iterations"
            change = f"it to {needed}, or leave {flag(given)} out"
            raise self._refuse(missing, f"a value beside {flag(given)} {getattr(self, given)}", change)

    @property
    def schedule(self) -> Schedule:
        """Which iterations are dense, and over how many a keep ratio moves."""
        return Schedule(self.warmup_steps, self.cycle_steps, self.dense_steps, self.dense_from, self.keep_ratio_steps)

    @property
    def ranks_targets(self) -> bool:
        """Whether any step leaves targets out, so that they are scored."""
        return least_ratio(self.keep_ratio, self.keep_ratio_end, self.schedule) < 1.0

    @property
    def ranks_visual(self) -> bool:
        """Whether any step leaves visual positions out, so that they are scored."""
        return least_ratio(self.visual_keep_ratio, self.visual_keep_ratio_end, self.schedule) < 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the score of targets uses the reference loss."""
        return self.ranks_targets and SCORES[self.score].needs_reference

    @property
    def elides(self) -> bool:
        """Whether any step can be shorter than the dense one."""
        return self.ranks_targets or self.ranks_visual

    def keep_ratio_in(self, step: int) -> float:
        """The share of targets that a sparse step ``step`` runs."""
        return keep_ratio_of(step, self.keep_ratio, self.keep_ratio_end, self.schedule)

    def visual_keep_ratio_in(self, step: int) -> float:
        """The share of visual positions that a sparse step ``step`` runs."""
        mean = keep_ratio_of(step, self.visual_keep_ratio, self.visual_keep_ratio_end, self.schedule)
        return drawn_ratio(mean, self.visual_keep_ratio_spread, seed=self.seed, step=step)

    def elides_in(self, step: int) -> bool:
        """Whether a sparse step ``step`` leaves anything out."""
        return min(self.keep_ratio_in(step), self.visual_keep_ratio_in(step)) < 1.0

    @property
    def unused(self) -> list[str]:
        """Flags that were given and mean nothing, as no teacher is needed."""
        of_teacher = ("teacher_load", "reference_cache", "teacher_offload")
        return [] if self.needs_teacher else [flag(name) for name in of_teacher if getattr(self, name)]

    def require_teacher(self) -> None:
        """Refuse a score that uses the reference loss when no teacher is named.

        Raises:
            ReGateError: ``teacher_load`` is missing.
        """
        if self.needs_teacher and not self.teacher_load:
            raise self._refuse(
                "teacher_load",
                f"a checkpoint directory or 'student' with {flag('score')} {self.score}",
                f"it to 'student', or {flag('score')} to one that needs none: {_without_teacher()}",
            )

    @property
    def learns_losses(self) -> bool:
        """Whether the score of targets uses the student's own losses."""
        return self.ranks_targets and SCORES[self.score].needs_difficulty

    @property
    def learns_gradients(self) -> bool:
        """Whether the score of visual positions uses the gradients that reached them."""
        return self.ranks_visual and VISUAL_SCORES[self.visual_score].needs_gradient

    @property
    def learns(self) -> bool:
        """Whether any score uses what earlier steps showed."""
        return self.learns_losses or self.learns_gradients

    def _check_number(self, name: str, allowed: str, ok: Any, example: str, integer: bool = False) -> None:
        value = getattr(self, name)
        kinds = int if integer else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not (is_number and (isinstance(value, int) or math.isfinite(value)) and ok(value)):
            raise self._refuse(name, allowed, f"it to {example}, for example")

    def _refuse(self, name: str, allowed: str, change: str) -> Exception:
        value = getattr(self, name)
        error = refuse(flag(name), given="nothing" if value is None else value, allowed=allowed, change=change)
        error.field = name
        return error

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ReGateConfig | None:
        """The settings in a parsed namespace; None when ``--regate`` is absent.

        Raises:
            ReGateError: values are out of their range, one line each.
        """
        if not getattr(args, "regate", False):
            return None
        names = [field.name for field in dataclasses.fields(cls) if field.name != "enabled"]
        values = {name: getattr(args, f"regate_{name}") for name in names}
        found: dict[str, ReGateError] = {}
        while True:
            try:
                config = cls(**values)
            except ReGateError as error:
                if error.field in values:
                    found[error.field] = error
                    del values[error.field]  # its default is in range: what else is wrong?
                    continue
                if not found:
                    raise
            if found:
                raise ReGateError("\n".join(map(str, found.values())))
            return config


def _without_teacher() -> str:
    return " or ".join(name for name, row in SCORES.items() if not row.needs_reference)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--regate" if name == "enabled" else "--regate-" + name.replace("_", "-")


def shown_default(field: dataclasses.Field) -> str:
    """The default of a field, for help texts and tables."""
    if isinstance(field.default, bool):
        return "off"  # ``enabled`` is on in Python; as a flag it is off until given
    return "none" if field.default is None else str(field.default)
