"""The scores that rank targets: one row of :data:`SCORES` each. Flags, checks, help and docs follow from the table.

Of two targets the one with the larger score is kept first. Losses are negative log-likelihoods in nats.

Shapes: X targets, of any samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table is read where torch is not installed, too
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What scores are made of, for every target of a step.

    Attributes:
        difficulty_X: m, the running average of the student's loss, or the prior of the token; float64. None where the
            score does not need it.
        reference_X: the frozen teacher's loss; float64. None where the score does not need it.
        reference_weight: λ.
        fusion: "sum" or "convex".
        keys: gives content keys, int64 [N, 2], the place of every target in its sample, int64 [X], and how many targets
            each key has, int64 [N].
        seed, step: of the run.
    """

    difficulty_X: Tensor | None
    reference_X: Tensor | None
    reference_weight: float
    fusion: str
    keys: Callable[[], tuple[Tensor, ...]]
    seed: int
    step: int


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        formula: for people; m, ref and L (λ) are those of :class:`Signals`.
        of: the score of every target, float64 [X].
        needs_reference: whether a teacher must give reference losses.
        needs_difficulty: whether the student's own losses are learned.
        is_blind: whether all targets score alike before any loss of the student is known.
    """

    formula: str
    of: Callable[[Signals], Tensor]
    needs_reference: bool = False
    needs_difficulty: bool = False
    is_blind: bool = False

    def needs_teacher(self, difficulty: str) -> bool:
        """Whether a teacher must give reference losses, for the score or for what m is."""
        return self.needs_reference or (self.needs_difficulty and difficulty == "kind")


def _fused(signals: Signals) -> Tensor:
    """The paper's ``m + λ·ref``, or the convex mix that fits its ablation better."""
    student_weight = 1.0 if signals.fusion == "sum" else 1.0 - signals.reference_weight
    return student_weight * signals.difficulty_X + signals.reference_weight * signals.reference_X


def _chance(signals: Signals) -> Tensor:
    from regate_megatron.method.chance import uniform_in_0_1  # needs torch, which reading the table must not

    return uniform_in_0_1(*signals.keys(), seed=signals.seed, step=signals.step)


SCORES: dict[str, Score] = {
    "regate": Score("m + L*ref", _fused, needs_reference=True, needs_difficulty=True),
    "student": Score("m", lambda signals: signals.difficulty_X, needs_difficulty=True, is_blind=True),
    "reference": Score("ref", lambda signals: signals.reference_X, needs_reference=True),
    "product": Score(
        "m * ref",
        lambda signals: signals.difficulty_X * signals.reference_X,
        needs_reference=True,
        needs_difficulty=True,
        is_blind=True,
    ),
    "minimum": Score(
        "the smaller of m and ref",
        lambda signals: signals.difficulty_X.minimum(signals.reference_X),
        needs_reference=True,
        needs_difficulty=True,
        is_blind=True,
    ),
    "excess": Score(
        "m - ref",
        lambda signals: signals.difficulty_X - signals.reference_X,
        needs_reference=True,
        needs_difficulty=True,
    ),
    "gain": Score(
        "ref - m",
        lambda signals: signals.reference_X - signals.difficulty_X,
        needs_reference=True,
        needs_difficulty=True,
    ),
    "random": Score("a random number", _chance),
}
