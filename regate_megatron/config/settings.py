"""The settings of ReGATE, and the only source of its command-line flags.

Every field of :class:`ReGateConfig` becomes one flag ``--regate-<name-with-dashes>``; ``enabled`` is ``--regate``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from regate_megatron.config.checks import check, check_names, refused
from regate_megatron.config.options import (
    BUDGETS,
    CONTEXTS,
    DENSE_AT,
    DIFFICULTIES,
    FUSIONS,
    PACKED_RATIOS,
    SHARES,
    TEACHER_VISUAL,
    flag,
    option,
)
from regate_megatron.errors import refuse
from regate_megatron.method.recipes import RECIPES
from regate_megatron.method.schedule import Schedule, drawn_ratio, keep_ratio_of, least_ratio
from regate_megatron.method.scores import SCORES
from regate_megatron.method.visual_scores import VISUAL_SCORES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReGateConfig:
    """All settings, complete and checked once constructed.

    Raises:
        ReGateError: a value is out of its range; one line with what was given, what is allowed, what to change.
    """

    enabled: bool = option(
        True, "train with ReGATE: in sparse steps some answer tokens or visual positions are left out of the decoder"
    )
    recipe: str | None = option(
        None,
        "take settings by name, but for those given beside it; "
        + ", ".join(f"{name}: {row.purpose}" for name, row in RECIPES.items()),
        tuple(RECIPES),
    )
    keep_ratio: float = option(
        0.5,
        "share of the answer tokens that runs in a sparse step: above 0, at most 1; 1 leaves none out",
        metavar="P",
    )
    keep_ratio_end: float | None = option(
        None,
        "let the keep ratio move from P to R, up or down, a little with every cycle; needs the next flag too; none: it "
        "stays P",
        metavar="R",
    )
    keep_ratio_steps: int | None = option(
        None,
        "iterations from the end of the warm-up until the keep ratio, or the visual one, has moved from P to R",
        metavar="N",
    )
    share: str = option(
        "sample",
        "whose answer tokens the keep ratio is a share of; sample: each sample's, batch: those of the global batch, by "
        "one threshold on the score, so that samples with little to learn leave up to half of their share to others",
        SHARES,
    )
    least_score: float | None = option(
        None,
        "with --regate-share batch: beyond half of the share only answer tokens whose score is above X run, so fewer "
        "run as the model learns; none: all of the share runs",
        metavar="X",
    )
    visual_keep_ratio: float = option(
        1.0,
        "share of the visual positions (tokens of a picture) of each image or video that runs in a sparse step: above "
        "0, at most 1; 1 leaves none out; with --regate-keep-ratio 1 beside it no teacher is needed; "
        "--regate-recipe pictures sets both",
        metavar="P",
    )
    visual_keep_ratio_end: float | None = option(
        None, "let the visual keep ratio move from P to R likewise, over as many iterations", metavar="R"
    )
    visual_keep_ratio_spread: float = option(
        0.0,
        "draw the visual keep ratio of every sparse step from a Beta distribution around P: 0 or more, below 1; 0: "
        "always P; near 1: nearly all or nothing",
        metavar="S",
    )
    visual_score: str = option(
        "even",
        "which visual positions run in sparse steps, those with the highest score; "
        + ", ".join(f"{name}: {row.formula}" for name, row in VISUAL_SCORES.items()),
        tuple(VISUAL_SCORES),
    )
    dense_layers: int = option(
        1,
        "the first N decoder layers run every token in sparse steps too; 0 is the paper's method; in a HybridModel "
        "attention and MLP are layers of their own",
        metavar="N",
    )
    dense_last_layers: int = option(
        0, "the last N decoder layers run every token again; not with pipeline parallelism", metavar="N"
    )
    warmup_steps: int = option(100, "the first N iterations of training are dense", metavar="N")
    cycle_steps: int = option(
        128, "after the warm-up, iterations come in cycles of N: first dense ones, then sparse ones", metavar="N"
    )
    dense_steps: int = option(
        16,
        "N iterations of each cycle are dense, the first ones: every position is trained, and scores with m in their "
        "formula see the student's loss on every answer token again",
        metavar="N",
    )
    dense_at: str = option(
        "start",
        "where in a cycle its dense iterations are; start: they come first, random: anywhere, drawn for each cycle "
        "from the seed, so that sparse iterations are no long block",
        DENSE_AT,
    )
    dense_from: int | None = option(
        None,
        "all iterations after the first N are dense, so that training ends on full rows, as evaluation has them; none: "
        "cycles go on to the end",
        metavar="N",
    )
    difficulty: str = option(
        "own",
        "what difficulty, m in scores, is; own: the running average of the student's loss on that very answer token, "
        "kind: the mean of its loss, in the last dense iterations, on answer tokens with the same label and about the "
        "same teacher's loss, for samples that come seldom; the teacher then runs in dense iterations too",
        DIFFICULTIES,
    )
    ema_decay: float = option(
        0.9,
        "how slowly difficulty, the running average m of the student's loss on an answer token, changes: m = B*m + "
        "(1-B)*loss; 0 or more, below 1",
        metavar="B",
    )
    reference_weight: float = option(
        0.5,
        "weight of the teacher's loss in the score 'regate': 0 or more; with --regate-fusion convex at most 1",
        metavar="L",
    )
    fusion: str = option(
        "sum",
        "how the score 'regate' is made of difficulty, m, and the teacher's loss, ref; sum: m + L*ref, convex: (1-L)*m "
        "+ L*ref, L the reference weight",
        FUSIONS,
    )
    score: str = option(
        "reference",
        "which answer tokens run in sparse steps, those with the highest score; "
        + ", ".join(f"{name}: {row.formula}" for name, row in SCORES.items())
        + "; m is difficulty, the student's average loss on the token, ref the teacher's loss",
        tuple(SCORES),
    )
    budget: str = option(
        "dealt",
        "how long rows are in a sparse step; uniform: all rows of all ranks alike, balanced: every data-parallel rank "
        "runs the same total, per-sample: every sample keeps exactly its share, and ranks differ, dealt: so too, but "
        "microbatches go to the ranks that their lengths ask for, so that all run about the same total",
        BUDGETS,
    )
    deal_dense: bool = option(
        False,
        "with --regate-budget dealt: microbatches go to other ranks in dense steps too, by their dense length; worth "
        "it where rows have lengths of their own; the gradient is that of the same global batch, summed in another "
        "order",
    )
    length_multiple: int | None = option(
        None,
        "lengths of shortened rows are rounded up to a multiple of N, so that few different ones occur; none: N is the "
        "largest power of two up to 1/32 of the dense length; what parallelism and FP8 need is added by itself",
        metavar="N",
    )
    packed_ratio: str = option(
        "sample",
        "what the keep ratio is a share of where a row holds several packed samples; sample: of the answer tokens of "
        "each sample, row: of all answer tokens of the row",
        PACKED_RATIOS,
    )
    context: str = option(
        "all",
        "which other tokens run (prompt, images); all: all of them, read: those before the last answer token of their "
        "sample, as no answer token can read the rest",
        CONTEXTS,
    )
    teacher_load: str | None = option(
        None,
        "the teacher: a folder with a Megatron torch_dist checkpoint of the language model the student started from, "
        "or 'student' for the student's own language model as it is when training starts",
        metavar="DIR|student",
    )
    teacher_visual: str = option(
        "drop",
        "what the teacher, which sees no images, reads in their place; drop: nothing, its rows are shorter, pad: one "
        "pad token per position",
        TEACHER_VISUAL,
    )
    reference_cache: str | None = option(
        None,
        "keep the teacher's losses in folder DIR for later runs; a run that finds all it needs there builds no teacher",
        metavar="DIR",
    )
    teacher_offload: bool = option(False, "keep the teacher's weights in host memory while it does not run")
    sample_key: str = option(
        "content",
        "how a sample is recognised when it comes again, so that its answer tokens keep their difficulty; content: "
        "by its text and pictures, text: by its text alone (for augmented pictures), NAME: by the id under that key of "
        "the batch",
        metavar="{content,text}|NAME",
    )
    difficulty_memory: float = option(
        4.0,
        "host memory for difficulty (and gradients, where visual positions are ranked by them), in GB (10^9 bytes) per "
        "data-parallel replica; when it is full, the samples seen longest ago are forgotten",
        metavar="GB",
    )
    reset_difficulty: bool = option(
        False, "resume without the difficulty that the checkpoint holds: start to learn it anew"
    )
    trace: str | None = option(
        None, "write one JSON line per microbatch into folder DIR: which tokens ran, with all scores", metavar="DIR"
    )
    seed: int = option(1234, "seed of all that is drawn by chance: scores, ratios, dense steps", metavar="N")

    def __post_init__(self) -> None:
        check(self)

    @property
    def schedule(self) -> Schedule:
        """Which iterations are dense, and over how many a keep ratio moves."""
        numbers = (self.warmup_steps, self.cycle_steps, self.dense_steps, self.dense_from, self.keep_ratio_steps)
        return Schedule(*numbers, self.seed if self.dense_at == "random" else None)

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
        """Whether ranking the targets uses the reference loss."""
        return self.ranks_targets and SCORES[self.score].needs_teacher(self.difficulty)

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

    @property
    def idle(self) -> list[str]:
        """Flags with values of their own that nothing in this run reads."""
        mixes = self.ranks_targets and self.score == "regate"
        reads = {"reference_weight": mixes, "fusion": mixes, "difficulty": self.learns_losses, "ema_decay": self.learns}
        reads |= {"visual_score": self.ranks_visual, "visual_keep_ratio_spread": self.ranks_visual}
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        usual |= RECIPES[self.recipe].values if self.recipe else {}
        return [flag(name) for name, is_read in reads.items() if not is_read and getattr(self, name) != usual[name]]

    def require_teacher(self) -> None:
        """Refuse a score that uses the reference loss when no teacher is named.

        Raises:
            ReGateError: ``teacher_load`` is missing.
        """
        if self.needs_teacher and not self.teacher_load:
            allowed = "a checkpoint folder, or 'student' for the student's language model as training starts"
            others = [name for name, row in SCORES.items() if not row.needs_teacher(self.difficulty)]
            without = ", ".join(f"{flag('score')} {name}" for name in others)
            pictures = f"{flag('recipe')} pictures (rows that are mostly pictures)"
            pictures = f"{flag('keep_ratio')} 1 (visual positions alone go)" if self.ranks_visual else pictures
            change = f"it to one of these, or to settings without a teacher: {without} or {pictures}"
            raise refused(self, "teacher_load", f"with {flag('score')} {self.score} {allowed}", change)

    @property
    def learns_losses(self) -> bool:
        """Whether the score of targets uses the student's own losses."""
        return self.ranks_targets and SCORES[self.score].needs_difficulty

    @property
    def by_kind(self) -> bool:
        """Whether what is learned of losses are those of kinds of targets."""
        return self.learns_losses and self.difficulty == "kind"

    @property
    def learns_gradients(self) -> bool:
        """Whether the score of visual positions uses the gradients that reached them."""
        return self.ranks_visual and VISUAL_SCORES[self.visual_score].needs_gradient

    @property
    def learns(self) -> bool:
        """Whether any score uses what earlier steps showed."""
        return self.learns_losses or self.learns_gradients


def require_settings(given: Any, what: str) -> None:
    """Refuse to ``what`` what is no :class:`ReGateConfig`, such as a dictionary.

    Raises:
        ReGateError: it is none.
    """
    if not isinstance(given, ReGateConfig):
        kind = f"settings of type {type(given).__name__}"
        raise refuse(what, given=kind, allowed="a ReGateConfig", change="them to ReGateConfig(…)")


_init = ReGateConfig.__init__


@functools.wraps(_init)
def _init_with_recipe(self: ReGateConfig, **given: Any) -> None:
    check_names(given, [field.name for field in dataclasses.fields(self)])
    name = given.get("recipe")
    _init(self, **(RECIPES[name].values if name in tuple(RECIPES) else {}) | given)


ReGateConfig.__init__ = _init_with_recipe
