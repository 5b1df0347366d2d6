"""Which phase an iteration is in, and its keep ratio. Pure.

METHOD: a global warm-up, then cycles of dense and sparse iterations. Ours besides: a dense end, a ratio that moves.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Phase = Literal["warmup", "dense", "sparse"]

_DECIMALS = 4  # of a moving ratio: no more than the budget can tell apart, and short in a log


@dataclass(frozen=True)
class Schedule:
    """Numbers of iterations; see the flags of the same names.

    Attributes:
        warmup_steps: dense at the start.
        cycle_steps: of a cycle after the warm-up,
        dense_steps: of them dense at its head.
        dense_from: all iterations after this many are dense; None: no dense end.
        ratio_steps: in which a moving keep ratio gets to its end, after the warm-up; None: it does not move.
    """

    warmup_steps: int
    cycle_steps: int
    dense_steps: int
    dense_from: int | None = None
    ratio_steps: int | None = None


def phase_of(step: int, schedule: Schedule) -> Phase:
    """The phase of training step ``step`` (0-based: the number of steps done before it).

    The warm-up is "warmup"; then every cycle begins with steps that are "dense" and goes on "sparse". Once
    ``dense_from`` steps are done, all that follow are "dense". A function of the step alone, so that a resumed run
    continues where it stopped.
    """
    if step < schedule.warmup_steps:
        return "warmup"
    if schedule.dense_from is not None and step >= schedule.dense_from:
        return "dense"
    return "dense" if (step - schedule.warmup_steps) % schedule.cycle_steps < schedule.dense_steps else "sparse"


def keep_ratio_of(step: int, start: float, end: float | None, schedule: Schedule) -> float:
    """The keep ratio of training step ``step``, counted as :func:`phase_of` does.

    It goes from ``start`` to ``end`` in a straight line over the ``ratio_steps`` steps after the warm-up and stays
    there; without an end it does not move. A cycle has the ratio of its first step, so that few lengths occur; between
    the ends it has four decimals, exactly, so that all ranks agree.
    """
    if end is None:
        return start
    done = max(step - schedule.warmup_steps, 0) // schedule.cycle_steps * schedule.cycle_steps
    if done == 0 or done >= schedule.ratio_steps:
        return end if done else start
    share = Fraction(done, schedule.ratio_steps)
    between = Fraction(str(start)) * (1 - share) + Fraction(str(end)) * share
    return min(max(float(round(between, _DECIMALS)), min(start, end)), max(start, end))
