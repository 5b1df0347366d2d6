"""Which phase an iteration is in (METHOD: global warm-up, then cycles of dense and sparse iterations). Pure."""

from typing import Literal

Phase = Literal["warmup", "dense", "sparse"]


def phase_of(step: int, *, warmup_steps: int, cycle_steps: int, dense_steps: int) -> Phase:
    """The phase of training step ``step`` (0-based: the number of steps done before it).

    The first ``warmup_steps`` steps are "warmup"; then every cycle of ``cycle_steps`` begins with ``dense_steps`` of
    "dense" and goes on "sparse". A function of the step alone, so that a resumed run continues where it stopped.
    """
    if step < warmup_steps:
        return "warmup"
    return "dense" if (step - warmup_steps) % cycle_steps < dense_steps else "sparse"


def mean_kept_share(keep_ratio: float, *, cycle_steps: int, dense_steps: int) -> float:
    """Average share of targets processed after the warm-up: F/C + (1 - F/C)·p (0.5625 for the paper's numbers)."""
    dense_share = dense_steps / cycle_steps
    return dense_share + (1 - dense_share) * keep_ratio
