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
from regate_megatron.method.schedule import Schedule, keep_ratio_of
from regate_megatron.method.scores import SCORES
from regate_megatron.method.visual_scores import VISUAL_SCORES

FUSIONS = ("sum", "convex")
BUDGETS = ("uniform", "balanced", "per-sample")
PACKED_RATIOS = ("row", "sample")
CONTEXTS = ("all", "read")
SAMPLE_KEYS = ("content", "text")
TEACHER_VISUAL = ("drop", "pad")
STUDENT_AS_TEACHER = "student"


def _option(default: Any, help_text: str, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices, "metavar": metavar})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReGateConfig:
    """All settings, complete and checked once constructed.

    Raises:
        ReGateError: a value is out of its range; one line with what was given, what is allowed, what to change.
    """

    enabled: bool = _option(True, "train with ReGATE token elision")
    keep_ratio: float = _option(0.5, "share p of the target tokens that stay active in sparse steps, in (0, 1]")
    keep_ratio_end: float | None = _option(
        None, "ratio that the keep ratio goes to, up or down, cycle by cycle; none: it stays", metavar="R"
    )
    keep_ratio_steps: int | None = _option(
        None, "iterations after the warm-up in which the keep ratio goes to its end", metavar="N"
    )
    visual_keep_ratio: float = _option(
        1.0,
        "share r of the visual positions of each image or clip that run in sparse steps, in (0, 1]; 1: all; with "
        "a keep ratio of 1 beside it no teacher is needed",
        metavar="R",
    )
    visual_score: str = _option(
        "random",
        "what ranks the visual positions: "
        + ", ".join(f"{name} = {row.formula}" for name, row in VISUAL_SCORES.items()),
        tuple(VISUAL_SCORES),
    )
    dense_layers: int = _option(
        1,
        "number of first decoder layers that see every token; 0 is the paper's method; "
        "a HybridModel counts attention and MLP apart",
    )
    dense_last_layers: int = _option(
        0, "number of last decoder layers that see every token again; no pipeline stages then"
    )
    warmup_steps: int = _option(100, "iterations at the start that run dense")
    cycle_steps: int = _option(128, "iterations per cycle after the warm-up (C)")
    dense_steps: int = _option(16, "dense iterations at the head of each cycle (F); they refresh every difficulty")
    dense_from: int | None = _option(
        None,
        "iterations after the first N all run dense: a cool-down before evaluation; N = train iterations - cool-down",
        metavar="N",
    )
    ema_decay: float = _option(0.9, "decay beta of the running average of the student's loss, in [0, 1)")
    reference_weight: float = _option(0.5, "weight lambda of the reference loss; 0 or more, at most 1 when convex")
    fusion: str = _option("sum", "m + lambda*ref (sum) or (1-lambda)*m + lambda*ref (convex)", FUSIONS)
    score: str = _option(
        "regate",
        "what ranks the targets: " + ", ".join(f"{name} = {row.formula}" for name, row in SCORES.items()),
        tuple(SCORES),
    )
    budget: str = _option(
        "uniform", "how many positions a row keeps: one length for all, equal totals per rank, own share", BUDGETS
    )
    length_multiple: int | None = _option(
        None,
        "kept lengths are a multiple of this, beside what the layout needs; none: of the largest power of two up to "
        "1/32 of the dense length, so that few lengths occur",
        metavar="N",
    )
    packed_ratio: str = _option(
        "sample", "what has its own share and floor in a packed row: each of its samples, or the row", PACKED_RATIOS
    )
    context: str = _option(
        "all", "context that runs: all of a row, or what its targets can read (up to its last one)", CONTEXTS
    )
    teacher_load: str | None = _option(
        None, "Megatron torch_dist checkpoint of the frozen text-only teacher, or 'student'", metavar="DIR|student"
    )
    teacher_visual: str = _option(
        "drop", "visual positions in the teacher's input: left out, or placeholders", TEACHER_VISUAL
    )
    reference_cache: str | None = _option(None, "directory that keeps reference losses between runs", metavar="DIR")
    teacher_offload: bool = _option(False, "keep the teacher's weights in host memory between uses")
    sample_key: str = _option(
        "content",
        "what finds a sample's difficulty again: its content (text and pictures), its text alone (pictures may be "
        "augmented), or an id of the batch's own, by the name of its key",
        metavar="{content,text}|NAME",
    )
    difficulty_memory: float = _option(
        4.0,
        "host memory for difficulty, per data-parallel rank, in 10^9 bytes; the least recently seen go",
        metavar="GB",
    )
    reset_difficulty: bool = _option(False, "resume without the difficulty in the checkpoint, which starts empty")
    trace: str | None = _option(
        None, "directory for one JSON line per microbatch: what was kept and why", metavar="DIR"
    )
    seed: int = _option(1234, "seed of the random score", metavar="N")

    def __post_init__(self) -> None:
        self._check_number("keep_ratio", "a finite number in (0, 1]", lambda v: 0 < v <= 1, "0.5")
        self._check_number("visual_keep_ratio", "a finite number in (0, 1]", lambda v: 0 < v <= 1, "0.25")
        self._check_number("ema_decay", "a finite number in [0, 1)", lambda v: 0 <= v < 1, "0.9")
        top = 1.0 if self.fusion == "convex" else math.inf
        allowed = "a finite number in [0, 1]" if self.fusion == "convex" else "a finite number of 0 or more"
        self._check_number("reference_weight", allowed, lambda v: 0 <= v <= top, "0.5")
        for name in ("dense_layers", "dense_last_layers", "warmup_steps", "dense_steps"):
            self._check_number(name, "an integer of 0 or more", lambda v: v >= 0, "1", True)
        self._check_number("cycle_steps", "an integer of 1 or more", lambda v: v >= 1, "128", True)
        if self.length_multiple is not None:
            self._check_number("length_multiple", "an integer of 1 or more", lambda v: v >= 1, "64", True)
        self._check_number("seed", "an integer of 0 or more, below 2**63", lambda v: 0 <= v < 2**63, "1234", True)
        self._check_number("difficulty_memory", "a finite number above 0 (10^9 bytes)", lambda v: v > 0, "4")
        if not isinstance(self.sample_key, str) or not self.sample_key.strip():
            raise self._refuse("sample_key", f"{', '.join(SAMPLE_KEYS)}, or a key of the batch", "it to content")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise self._refuse(field.name, "one of " + ", ".join(choices), f"it to {choices[0]}")
        if self.dense_steps > self.cycle_steps:
            raise self._refuse(
                "dense_steps",
                f"0 to {self.cycle_steps}, the cycle",
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
        reference losses beside them targets do differ.)
        """
        shows = self.warmup_steps or self.dense_steps or self.keep_ratio == 1.0
        is_alone = self.learns and (not self.needs_teacher or (self.score == "regate" and not self.reference_weight))
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
        if self.keep_ratio_end is not None:
            allowed = "none, or a finite number in (0, 1]"
            self._check_number("keep_ratio_end", allowed, lambda v: 0 < v <= 1, "0.5")
        if self.keep_ratio_steps is not None:
            allowed = "none, or an integer of 1 or more"
            self._check_number("keep_ratio_steps", allowed, lambda v: v >= 1, "1000", True)
        if (self.keep_ratio_end is None) != (self.keep_ratio_steps is None):
            given, missing = sorted(("keep_ratio_end", "keep_ratio_steps"), key=lambda n: getattr(self, n) is None)
            change = f"it to where the ratio shall go or get there, or leave {flag(given)} out"
            raise self._refuse(missing, f"a value beside {flag(given)} {getattr(self, given)}", change)

    @property
    def schedule(self) -> Schedule:
        """Which iterations are dense, and over how many a keep ratio moves."""
        return Schedule(self.warmup_steps, self.cycle_steps, self.dense_steps, self.dense_from, self.keep_ratio_steps)

    @property
    def ranks_targets(self) -> bool:
        """Whether targets are scored: not where visual positions alone are left out."""
        return min(self.keep_ratio, self.keep_ratio_end or 1.0) < 1.0 or self.visual_keep_ratio == 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the score of targets uses the reference loss."""
        return self.ranks_targets and SCORES[self.score].needs_reference

    @property
    def elides(self) -> bool:
        """Whether any step can be shorter than the dense one."""
        return min(self.keep_ratio, self.keep_ratio_end or 1.0, self.visual_keep_ratio) < 1.0

    def elides_in(self, step: int) -> bool:
        """Whether a sparse step ``step`` leaves anything out."""
        of_targets = keep_ratio_of(step, self.keep_ratio, self.keep_ratio_end, self.schedule)
        return min(of_targets, self.visual_keep_ratio) < 1.0

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
    def learns(self) -> bool:
        """Whether the score of targets uses the student's own losses."""
        return self.ranks_targets and SCORES[self.score].needs_difficulty

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


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of ReGATE to ``parser``, with the defaults of :class:`ReGateConfig`; returns the parser.

    Ranges and choices are left to :class:`ReGateConfig`, so that every refusal has one form.
    """
    group = parser.add_argument_group(title="regate", description="reference-guided adaptive token elision")
    types = {"int": int, "float": float, "str": str, "str | None": str, "int | None": int, "float | None": float}
    for field in dataclasses.fields(ReGateConfig):
        help_text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            default = "" if field.name == "enabled" else " (default: %(default)s)"
            group.add_argument(flag(field.name), action="store_true", help=help_text + default)
            continue
        choices, metavar = field.metadata["choices"], field.metadata["metavar"]
        group.add_argument(
            flag(field.name),
            type=types[str(field.type)],
            default=field.default,
            metavar="{" + ",".join(choices) + "}" if choices else metavar,
            help=f"{help_text} (default: {field.default})",
        )
    return parser


def parse(argv: Sequence[str]) -> ReGateConfig | None:
    """Read ReGATE's flags out of a command line, leaving every other flag alone; None without ``--regate``.

    Raises:
        ReGateError: a value is out of its range, or a flag that starts with ``--regate`` is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    try:
        args, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        name = error.argument_name or "command line"
        raise refuse(name, given=error.message, allowed="one value of its kind, see --help", change="it") from None
    unknown = [word for word in rest if word.startswith("--regate")]
    if unknown:
        known = ", ".join(flag(field.name) for field in dataclasses.fields(ReGateConfig))
        raise refuse("command line", given=unknown[0], allowed=known, change="the spelling")
    return ReGateConfig.from_args(args)


def parse_command_line(argv: Sequence[str]) -> ReGateConfig | None:
    """:func:`parse` for a launcher: also refuses a score whose teacher is missing.

    Raises:
        ReGateError: as :func:`parse` and :meth:`ReGateConfig.require_teacher`; every rank has the same command line, so
            every rank raises.
    """
    try:
        config = parse(argv)
        if config is not None:
            config.require_teacher()
    except ReGateError as error:
        error.everywhere = True
        raise
    return config
