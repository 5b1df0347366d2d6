"""Which phase an iteration is in, and its keep ratio. Pure.

The paper has a warm-up, then cycles of dense and sparse iterations. Ours in addition: dense iterations scattered over
their cycle, a dense end, and a keep ratio that moves, or is drawn around its mean.
"""

import random
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

Phase = Literal["warmup", "dense", "sparse"]

_DECIMALS = 4  # of a moving ratio: no more than the budget can tell apart, and short in a log


@dataclass(frozen=True)
class Schedule:
    """The schedule, in numbers of iterations; all but the last are flags of the same names.

    Attributes:
        warmup_steps: dense iterations at the start.
        cycle_steps: iterations of a cycle; cycles follow the warm-up.
        dense_steps: how many iterations of each cycle are dense: those at its start, unless they are scattered.
        dense_from: all iterations after this many are dense; None: cycles go on to the end.
        ratio_steps: iterations after the warm-up over which the keep ratio moves (``--regate-keep-ratio-steps``); None:
            it does not move.
        scatter_seed: dense iterations are drawn for each cycle anew, from this; None: they come first
            (``--regate-dense-at``).
    """

    warmup_steps: int
    cycle_steps: int
    dense_steps: int
    dense_from: int | None = None
    ratio_steps: int | None = None
    scatter_seed: int | None = None

    @property
    def first_sparse(self) -> int | None:
        """The first sparse step; None where there is none, however long training goes on."""
        if self.dense_steps >= self.cycle_steps:
            return None
        end = self.warmup_steps + self.cycle_steps
        end = end if self.dense_from is None else min(end, self.dense_from)
        return next((step for step in range(self.warmup_steps, end) if phase_of(step, self) == "sparse"), None)

    def describe(self) -> str:
        """For people."""
        scattered = "" if self.scatter_seed is None else ", scattered"
        end = "" if self.dense_from is None else f", all of them after iteration {self.dense_from}"
        return f"warm-up {self.warmup_steps}, then {self.dense_steps} of {self.cycle_steps} steps dense{scattered}{end}"


def phase_of(step: int, schedule: Schedule) -> Phase:
    """The phase of training step ``step`` (0-based: the number of steps done before it).

    First "warmup"; then cycles, each of "dense" steps followed by "sparse" ones, or of both in an order drawn from the
    seed; once ``dense_from`` steps are done, "dense" to the end. It depends on the step alone, so that a resumed run
    continues where it stopped.
    """
    if step < schedule.warmup_steps:
        return "warmup"
    if schedule.dense_from is not None and step >= schedule.dense_from:
        return "dense"
    cycle, place = divmod(step - schedule.warmup_steps, schedule.cycle_steps)
    if schedule.scatter_seed is not None:
        place = _shuffled(schedule.scatter_seed, cycle, schedule.cycle_steps)[place]
    return "dense" if place < schedule.dense_steps else "sparse"


@lru_cache(maxsize=2)
def _shuffled(seed: int, cycle: int, steps: int) -> list[int]:
    """The numbers below ``steps`` in the order of a cycle; frozen, as a resumed run must draw the same."""
    state = _mix(_mix(seed + _GOLDEN) + cycle * _GOLDEN)
    by_chance = sorted(range(steps), key=lambda place: (_mix(state + (place + 1) * _GOLDEN), place))
    order = [0] * steps
    for number, place in enumerate(by_chance):
        order[place] = number
    return order


_WORD, _GOLDEN = 1 << 64, 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of splitmix64, as :mod:`.chance` has it for tensors."""
    x %= _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _WORD
    return x ^ (x >> 31)


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
