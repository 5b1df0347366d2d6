"""One training step on one rank: a value that its stages fill, in order.

    peek → read → deal → reference → plan → run → learned | forgotten

Who runs the stages is :class:`~regate_megatron.step.session.Session`; what it counts is beside, in :mod:`.counters`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from regate_megatron.batches import MicrobatchFacts, StepFacts
from regate_megatron.method.plan import StepPlan
from regate_megatron.method.schedule import Phase

Stage = Literal["new", "peek", "read", "deal", "reference", "plan", "run", "learned", "forgotten"]


@dataclass(frozen=True)
class Balance:
    """Positions that data-parallel ranks run in one sparse step, alignment and fill included.

    Attributes:
        slowest, own, mean: of the rank that runs most, of this rank, of all ranks.
        achievable: the least max/mean that contexts and row lengths allow; None where the budget does not balance.
        dense_slowest: what the rank that runs most would run in a dense step.
    """

    slowest: int
    own: int
    mean: float
    achievable: float | None = None
    dense_slowest: int = 0


@dataclass
class Step:
    """What is known of a step so far.

    Attributes:
        number: steps done before it.
        phase: what the schedule says.
        elides: whether the schedule asks to leave something out.
        ranks_targets: whether answer tokens are among what it leaves out.
        stage: the stage it is in.
        batches: per data iterator this step's microbatches, or None where this rank has none.
        facts: per microbatch, on planners; None elsewhere.
        reference: per sample the teacher's losses of its targets, float32 [T], on planners of a sparse step with a
            teacher.
        scores: per microbatch the scores of its targets, float64 [X], on planners of a sparse step.
        above: per microbatch which of its targets the batch's threshold keeps, bool [X], on planners of a sparse step
            whose keep ratio is a share of the batch.
        is_known: per microbatch which of its targets have a difficulty of their own, bool [X], on planners of a sparse
            step whose score needs it.
        is_visual_known: which of its visual candidates a dense step has shown the gradient of, bool, on planners of a
            sparse step whose visual score needs it.
        num_asked, num_found: samples whose reference losses were looked up, and of them found, on planners.
        at_best: the least max/mean of any deal of this step's microbatches, on planners of a step that was dealt.
        plan: what runs; dense until planned.
        fallback: whether a score that is no number made a sparse step run dense.
        balance: how positions are spread over ranks, on planners of a sparse step.
        losses: per-token losses as the loss hooks saw them, on ranks that see losses.
        norms: by microbatch the norms of gradients as the decoder hooks saw them, on ranks that compact, in steps that
            are watched; None in others, on every rank.
        seconds: time spent in each stage on this rank.
    """

    number: int
    phase: Phase
    elides: bool
    ranks_targets: bool = True
    stage: Stage = "new"
    batches: list[list[Any] | None] = field(default_factory=list)
    facts: list[MicrobatchFacts] | None = None
    reference: Sequence[Tensor] | None = None
    scores: Sequence[Tensor] | None = None
    above: Sequence[Tensor] | None = None
    is_known: Sequence[Tensor] | None = None
    is_visual_known: Tensor | None = None
    num_asked: int = 0
    num_found: int = 0
    at_best: float | None = None
    plan: StepPlan = field(init=False)
    fallback: bool = False
    balance: Balance | None = None
    losses: list[Tensor] = field(default_factory=list)
    norms: dict[int, Tensor] | None = None
    seconds: dict[Stage, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = StepPlan(self.number)

    @property
    def own(self) -> list[Any] | None:
        """The microbatches of this rank's last chunk that has any, which planners read; None where none has."""
        return next((pulled for pulled in reversed(self.batches) if pulled is not None), None)

    @cached_property
    def whole(self) -> StepFacts:
        """The facts of all microbatches together, on planners; asked for once they are read."""
        return StepFacts(self.facts)

    def take_facts(self, facts: list[MicrobatchFacts]) -> None:
        """Know the microbatches by these facts; those of microbatches that were dealt away are forgotten."""
        self.facts = facts
        vars(self).pop("whole", None)

    @contextmanager
    def enter(self, stage: Stage) -> Iterator[None]:
        """Be in ``stage`` for the time of the block, which is added to what the stage took before."""
        self.stage, start = stage, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
