"""Which phase an iteration is in, and its keep ratio. Pure.

The paper has a warm-up, then cycles of dense and sparse iterations. Ours in addition: a dense end, and a keep ratio
that moves, or is drawn around its mean.
"""

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Phase = Literal["warmup", "dense", "sparse"]

_DECIMALS = 4  # of a moving ratio: no more than the budget can tell apart, and short in a log


@dataclass(frozen=True)
class Schedule:
    """The schedule, in numbers of iterations; all but the last are flags of the same names.

    Attributes:
        warmup_steps: dense iterations at the start.
        cycle_steps: iterations of a cycle; cycles follow the warm-up.
        dense_steps: how many iterations at the start of each cycle are dense.
        dense_from: all iterations after this many are dense; None: cycles go on to the end.
        ratio_steps: iterations after the warm-up over which the keep ratio moves (``--regate-keep-ratio-steps``); None:
            it does not move.
    """

    warmup_steps: int
    cycle_steps: int
    dense_steps: int
    dense_from: int | None = None
    ratio_steps: int | None = None

    @property
    def first_sparse(self) -> int | None:
        """The first sparse step; None where there is none, however long training goes on."""
        first = self.warmup_steps + self.dense_steps
        is_any = self.dense_steps < self.cycle_steps and (self.dense_from is None or first < self.dense_from)
        return first if is_any else None


def phase_of(step: int, schedule: Schedule) -> Phase:
    """The phase of training step ``step`` (0-based: the number of steps done before it).

    First "warmup"; then cycles, each of "dense" steps followed by "sparse" ones; once ``dense_from`` steps are done,
    "dense" to the end. It depends on the step alone, so that a resumed run continues where it stopped.
    """
    if step < schedule.warmup_steps:
        return "warmup"
    if schedule.dense_from is not None and step >= schedule.dense_from:
        return "dense"
    return "dense" if (step - schedule.warmup_steps) % schedule.cycle_steps < schedule.dense_steps else "sparse"


def keep_ratio_of(step: int, start: float, end: float | None, schedule: Schedule) -> float:
    """The keep ratio of training step ``step``, counted as :func:`phase_of` does.

    It moves from ``start`` to ``end`` in a straight line over the ``ratio_steps`` steps after the warm-up and stays
    there; without an end it does not move. All steps of a cycle have the ratio of its first one, so that few lengths
    occur. Between the ends it is rounded to four decimals, exactly, so that all ranks agree.
    """
    if end is None:
        return start
    done = max(step - schedule.warmup_steps, 0) // schedule.cycle_steps * schedule.cycle_steps
    if done == 0 or done >= schedule.ratio_steps:
        return end if done else start
    share = Fraction(done, schedule.ratio_steps)
    between = Fraction(str(start)) * (1 - share) + Fraction(str(end)) * share
    return min(max(float(round(between, _DECIMALS)), min(start, end)), max(start, end))


def least_ratio(start: float, end: float | None, schedule: Schedule) -> float:
    """The least keep ratio of any sparse step; 1.0 where there is no such step."""
    if schedule.first_sparse is None:
        return 1.0
    if end is None or schedule.dense_from is None:
        return start if end is None else min(start, end)
    ends = (schedule.first_sparse, schedule.dense_from - 1)  # it goes one way
    return min(keep_ratio_of(step, start, end, schedule) for step in ends)


def drawn_ratio(mean: float, spread: float, *, seed: int, step: int) -> float:
    """The ratio that step ``step`` draws from a Beta distribution; the same on every rank and machine.

    Args:
        mean: of the distribution.
        spread: its standard deviation, as a share of the largest that a number from 0 to 1 with this mean can have
            (which is that of all or nothing); 0 draws nothing.
    """
    if not spread or mean == 1.0:
        return mean
    strength = 1 / spread**2 - 1
    chance = random.Random(f"visual keep ratio, seed {seed}, step {step}")
    drawn = chance.betavariate(mean * strength, (1 - mean) * strength)
    return min(max(round(drawn, _DECIMALS), 10**-_DECIMALS), 1.0)
