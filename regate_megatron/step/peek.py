"""The first stage of a step: its microbatches, exactly as many as it has, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regate_megatron.errors import refuse


def pull(iterator: Iterator[Any] | None, count: int) -> list[Any] | None:
    """The next ``count`` microbatches; None where this rank has no data.

    Raises:
        ReGateError: the data end before.
    """
    if iterator is None:
        return None
    pulled: list[Any] = []
    try:
        while len(pulled) < count:
            pulled.append(next(iterator))
    except (StopIteration, RuntimeError) as end:  # a generator turns the end of what it reads into a RuntimeError
        if not isinstance(end, StopIteration) and not isinstance(end.__cause__, StopIteration):
            raise
        raise refuse(
            "data iterator",
            given=f"the end of its data after {len(pulled)} of {count} microbatches",
            allowed=f"all {count} microbatches of every step",
            change="the data (more of it, or one that repeats), or the number of training iterations",
        ) from None
    return pulled
