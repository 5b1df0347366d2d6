"""Simulated data-parallel ranks for code that exchanges numbers at most once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Asked(Exception):
    """A rank has reached the exchange."""


def over_ranks(count: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """``work(rank, all_gather)`` of every rank: once up to the exchange, then whole, with what all ranks gave."""
    given: list[Tensor] = []

    def ask(values: Tensor) -> Tensor:
        assert values.dtype == torch.int64 and values.dim() == 1 and len(values) <= 8
        given.append(values)
        raise _Asked

    results = []
    for rank in range(count):
        try:
            results.append(work(rank, ask))
        except _Asked:
            continue
    assert not (given and results), "some ranks exchange and others do not: that would hang"
    if not given:
        return results
    exchanges = [0]

    def answer(values: Tensor) -> Tensor:
        exchanges[0] += 1
        assert torch.equal(values, given[exchanges[0] - 1]), "a second exchange, or other numbers"
        return torch.stack(given)

    return [work(rank, answer) for rank in range(count)]
