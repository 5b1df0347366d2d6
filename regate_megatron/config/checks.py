"""Which values settings may have, alone and together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from regate_megatron.config.options import SAMPLE_KEYS, flag
from regate_megatron.errors import ReGateError, nearest, refuse
from regate_megatron.method.scores import SCORES

if TYPE_CHECKING:
    from regate_megatron.config.settings import ReGateConfig


def check(config: ReGateConfig) -> None:
    """Refuse a value out of its range, or settings that do not go together.

    Raises:
        ReGateError: one line with what was given, what is allowed, what to change.
    """
    _check_number(config, "keep_ratio", "a number above 0, at most 1", lambda v: 0 < v <= 1, "0.5")
    _check_number(config, "visual_keep_ratio", "a number above 0, at most 1", lambda v: 0 < v <= 1, "0.25")
    _check_number(config, "visual_keep_ratio_spread", "a number of 0 or more, below 1", lambda v: 0 <= v < 1, "0.5")
    _check_number(config, "ema_decay", "a number of 0 or more, below 1", lambda v: 0 <= v < 1, "0.9")
    top = 1.0 if config.fusion == "convex" else math.inf
    allowed = (
        f"a number from 0 to 1 with {flag('fusion')} convex" if config.fusion == "convex" else "a number of 0 or more"
    )
    _check_number(config, "reference_weight", allowed, lambda v: 0 <= v <= top, "0.5")
    for name in ("dense_layers", "dense_last_layers", "warmup_steps", "dense_steps"):
        _check_number(config, name, "an integer of 0 or more", lambda v: v >= 0, "1", True)
    _check_number(config, "cycle_steps", "an integer of 1 or more", lambda v: v >= 1, "128", True)
    if config.least_score is not None:
        _check_number(config, "least_score", "none, or a number", lambda v: True, "0.5")
        if config.share != "batch":
            allowed = f"it with {flag('share')} batch"
            raise refused(config, "least_score", allowed, f"{flag('share')} to batch, or leave it out")
    if config.length_multiple is not None:
        _check_number(config, "length_multiple", "an integer of 1 or more", lambda v: v >= 1, "64", True)
    _check_number(config, "seed", "an integer of 0 or more, below 2**63", lambda v: 0 <= v < 2**63, "1234", True)
    _check_number(config, "difficulty_memory", "a number above 0 (of 10^9 bytes)", lambda v: v > 0, "4")
    if not isinstance(config.sample_key, str) or not config.sample_key.strip():
        raise refused(config, "sample_key", f"{', '.join(SAMPLE_KEYS)}, or a key of the batch", "it to content")
    for field in dataclasses.fields(config):
        choices = field.metadata["choices"]
        value = getattr(config, field.name)
        if choices and value not in choices and (value is not None or field.default is not None):
            change = nearest(str(value), choices, f"it to {field.default or choices[0]}")
            raise refused(config, field.name, "one of " + ", ".join(choices), change)
    if config.dense_steps > config.cycle_steps:
        raise refused(
            config,
            "dense_steps",
            f"0 to {config.cycle_steps}, the length of a cycle",
            f"it to {min(16, config.cycle_steps)} or raise {flag('cycle_steps')}",
        )
    if config.deal_dense and config.budget != "dealt":
        raise refused(
            config, "deal_dense", f"it beside {flag('budget')} dealt", f"{flag('budget')} to dealt, or leave it out"
        )
    _check_moving_ratio(config)
    if config.dense_from is not None:
        least = config.warmup_steps + 1
        allowed = f"none, or an integer of {least} or more (after the warm-up)"
        _check_number(config, "dense_from", allowed, lambda v: v >= least, str(least), True)
    _check_learns(config)


def check_names(given: Iterable[str], fields: Sequence[str]) -> None:
    """Refuse a name that is no field of the settings.

    Raises:
        ReGateError: one line with the nearest name.
    """
    for name in given:
        if name not in fields:
            change = nearest(name.removeprefix("regate_"), fields)
            raise refuse("ReGateConfig", given=f"{name}=…", allowed=", ".join(fields), change=change)


def _check_learns(config: ReGateConfig) -> None:
    """Refuse a score of the student's losses alone where no step ever shows those of elided targets.

    All would start with one score, so the first targets of each row would be kept, and kept for ever. (A ratio that
    starts at 1 shows all losses in its first cycle; a cool-down comes when nothing is elided any more. With
    reference losses beside them targets do differ.) Likewise a score of gradients that no step shows.
    """
    dense = config.warmup_steps or config.dense_steps
    if config.enabled and config.learns_gradients and not dense:
        more = f"{flag('warmup_steps')} or {flag('dense_steps')} to 1 or more"
        given = f"{config.visual_score} with {flag('warmup_steps')} 0 and {flag('dense_steps')} 0"
        allowed = "dense steps, which alone show gradients"
        raise refuse(flag("visual_score"), given=given, allowed=allowed, change=f"{more}, or it to even")
    shows = dense or config.keep_ratio == 1.0
    is_blind = SCORES[config.score].is_blind or (config.score == "regate" and not config.reference_weight)
    if config.enabled and config.learns_losses and is_blind and not shows:
        given = f"{config.score} with {flag('warmup_steps')} 0 and {flag('dense_steps')} 0"
        if config.score == "regate":
            given += f" and {flag('reference_weight')} 0"
        raise refuse(
            flag("score"),
            given=given,
            allowed="a score that differs from target to target before any loss is known",
            change=f"{flag('warmup_steps')} or {flag('dense_steps')} to 1 or more, or {flag('score')} to reference",
        )


def _check_moving_ratio(config: ReGateConfig) -> None:
    ends = [name for name in ("keep_ratio_end", "visual_keep_ratio_end") if getattr(config, name) is not None]
    for name in ends:
        _check_number(config, name, "none, or a number above 0, at most 1", lambda v: 0 < v <= 1, "0.5")
    if config.keep_ratio_steps is not None:
        allowed = "none, or an integer of 1 or more"
        _check_number(config, "keep_ratio_steps", allowed, lambda v: v >= 1, "1000", True)
    if bool(ends) != (config.keep_ratio_steps is not None):
        given, missing = (ends[0], "keep_ratio_steps") if ends else ("keep_ratio_steps", "keep_ratio_end")
        needed = "the ratio to move to" if missing == "keep_ratio_end" else "a number of iterations"
        change = f"it to {needed}, or leave {flag(given)} out"
        raise refused(config, missing, f"a value beside {flag(given)} {getattr(config, given)}", change)


def _check_number(config: ReGateConfig, name: str, allowed: str, ok: Any, example: str, integer: bool = False) -> None:
    value = getattr(config, name)
    kinds = int if integer else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (is_number and (isinstance(value, int) or math.isfinite(value)) and ok(value)):
        change = f"it to {example}, for example"
        if isinstance(value, str):
            change = f"it to a number, such as {example}, not text"
        elif "at most 1" in allowed and is_number and 1 < value <= 100:
            change = f"it to {value / 100:g}, if {value:g} % was meant"
        raise refused(config, name, allowed, change)


def refused(config: ReGateConfig, name: str, allowed: str, change: str) -> ReGateError:
    """The refusal of a field's value."""
    value = getattr(config, name)
    error = refuse(flag(name), given="nothing" if value is None else value, allowed=allowed, change=change)
    error.field = name
    return error
