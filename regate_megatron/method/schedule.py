"""Which phase an iteration is in, and its keep ratio. Pure.

METHOD: a global warm-up, then cycles of dense and sparse iterations. Ours besides: a dense end, a ratio that moves.
"""

from fractions import Fraction
from typing import Literal

from regate_megatron.config import ReGateConfig

Phase = Literal["warmup", "dense", "sparse"]

_DECIMALS = 4  # of a moving ratio: no more than the budget can tell apart, and short in a log


def phase_of(
    step: int, *, warmup_steps: int, cycle_steps: int, dense_steps: int, dense_from: int | None = None
) -> Phase:
    """The phase of training step ``step`` (0-based: the number of steps done before it).

    The first ``warmup_steps`` steps are "warmup"; then every cycle of ``cycle_steps`` begins with ``dense_steps`` of
    "dense" and goes on "sparse". Once ``dense_from`` steps are done, all that follow are "dense". A function of the
    step alone, so that a resumed run continues where it stopped.
    """
    if step < warmup_steps:
        return "warmup"
    if dense_from is not None and step >= dense_from:
        return "dense"
    return "dense" if (step - warmup_steps) % cycle_steps < dense_steps else "sparse"


def keep_ratio_of(step: int, config: ReGateConfig) -> float:
    """The keep ratio of training step ``step``, counted as :func:`phase_of` does.

    It goes from ``keep_ratio`` to ``keep_ratio_end`` in a straight line over the ``keep_ratio_steps`` steps after the
    warm-up and stays there. A cycle has the ratio of its first step, so that few lengths occur; between the ends it has
    four decimals, exactly, so that all ranks agree.
    """
    start, end = config.keep_ratio, config.keep_ratio_end
    if end is None:
        return start
    done = max(step - config.warmup_steps, 0) // config.cycle_steps * config.cycle_steps
    if done == 0 or done >= config.keep_ratio_steps:
        return end if done else start
    share = Fraction(done, config.keep_ratio_steps)
    between = Fraction(str(start)) * (1 - share) + Fraction(str(end)) * share
    return min(max(float(round(between, _DECIMALS)), min(start, end)), max(start, end))
