"""Read ReGATE's traces: what ran in each iteration, counted as its own log lines count it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Counts:
    """Sums over the rows of one iteration, all data-parallel ranks.

    Attributes:
        targets_total: positions with loss in the batch.
        targets_processed: those that were not elided.
        positions_dense: positions of the dense rows: picture, instruction, answer and padding.
        positions_run: positions that ran in the elided layers, fill included.
        samples: content keys of the rows.
    """

    targets_total: int = 0
    targets_processed: int = 0
    positions_dense: int = 0
    positions_run: int = 0
    samples: tuple[str, ...] = ()


def read_trace(folder: Path) -> Iterator[dict]:
    """The records of a trace, one per microbatch, rank by rank."""
    for file in sorted(folder.glob("dp*.jsonl")):
        with file.open() as lines:
            yield from map(json.loads, lines)


def count(folder: Path) -> dict[int, Counts]:
    """What ran in each iteration of a traced run."""
    result: dict[int, Counts] = {}
    for record in read_trace(folder):
        one, rows = result.setdefault(record["iteration"], Counts()), record["rows"]
        one.targets_total += sum(row["num_targets"] for row in rows)
        one.targets_processed += sum(row["num_kept_targets"] for row in rows)
        one.positions_dense += len(rows) * record["dense_length"]
        one.positions_run += len(rows) * record["kept_length"]
        one.samples = tuple(sorted((*one.samples, *(row["sample_key"] for row in rows))))
    return dict(sorted(result.items()))


def count_dense(traced: dict[int, Counts]) -> dict[int, Counts]:
    """What a run that elides nothing processes on the same samples: all of their targets, all of their positions."""
    return {
        iteration: Counts(one.targets_total, one.targets_total, one.positions_dense, one.positions_dense, one.samples)
        for iteration, one in traced.items()
    }


def cumulated(counts: dict[int, Counts]) -> dict[int, int]:
    """Targets processed up to each iteration."""
    total, result = 0, {}
    for iteration, one in counts.items():
        total += one.targets_processed
        result[iteration] = total
    return result
