"""The first stage of a step: its microbatches, exactly as many as it has, of lengths that the layout takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from regate_megatron.batches import MicrobatchFacts
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


def check_lengths(facts: Sequence[MicrobatchFacts], has_one_dense_length: bool, segment_multiple: int) -> None:
    """Refuse dense lengths that the layout cannot cut or send.

    Args:
        has_one_dense_length: whether all microbatches of a step must be as long.
        segment_multiple: what the length of every row or segment must be a multiple of.

    Raises:
        ReGateError: on this planner; all ranks agree on it.
    """
    lengths = sorted({one.dense_length for one in facts})
    if has_one_dense_length and len(lengths) > 1:
        raise refuse(
            "pipeline parallelism",
            given=f"microbatches of lengths {lengths}",
            allowed="one length per step before tokens are left out, or a host that sets variable_seq_lengths",
            change="the data loader, or --pipeline-model-parallel-size to 1",
        )
    if segment_multiple == 1:
        return
    odd = {n for one in facts for n in one.segment_length_N.tolist() if n % segment_multiple}
    if odd:
        raise refuse(
            "context parallelism",
            given=f"rows or segments of {sorted(odd)} positions",
            allowed=f"multiples of {segment_multiple}",
            change="the data loader's padding",
        )
