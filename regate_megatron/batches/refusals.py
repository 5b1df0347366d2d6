"""Refusals of a model by its family: every rank has the same model, so every rank raises them."""

from __future__ import annotations

from typing import Any

from regate_megatron.errors import ReGateError, refuse


def refused_model(given: str, allowed: str, change: str) -> ReGateError:
    """The error for a model that is not supported."""
    error = refuse("model", given=given, allowed=allowed, change=change)
    error.everywhere = True
    return error


def on_one_context_rank(
    model: Any, given: str, why: str = "as it was never run on more", change: str = "or train it without --regate"
) -> None:
    """Refuse context parallelism of a family that cannot have it, or that no test has run with it."""
    size = model.config.context_parallel_size
    if size > 1:
        raise refused_model(f"{given} on {size} context ranks", f"one, {why}", f"context_parallel_size to 1, {change}")
