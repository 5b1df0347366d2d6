#!/usr/bin/env python3
"""Against the alternatives: same model, same batch, same kept tokens, same run.

    python -m benchmarks.alternatives             # about two minutes; out/bench/alternatives.json
    python -m benchmarks.alternatives --quick

Every round runs one step per way, in rotating order, under one plan made beforehand (kept.py says what each way does):
all context and half of the targets. Planning is in none of the times; step_time.py measures it. Two tables:

* **step**: the way's step ÷ the dense step. Less is faster.
* **ours is faster by**: the way's step ÷ ours, and the same of the decoder alone.

random-LTD keeps as many positions, drawn anew in each of its layers, and runs the first and the last layer dense, as
its authors do; the row of ours with 2 dense layers has as many.
DeepSpeed's own wrappers run where DeepSpeed is installed (`pip install deepspeed`; its kernels are CUDA only, torch
stands in for them on a CPU), else the same written anew.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import models
from benchmarks.measuring import figure, rounds_within, run_part, spread
from benchmarks.models import Size
from benchmarks.stepping import Step
from benchmarks.work import Work

KEEP_RATIO, BATCHES = 0.5, 4


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ways on all batches."""
    models.start()
    from benchmarks.kept import Compact, MaskTheLoss, PerLayer, Planned, random_plan
    from benchmarks.random_ltd import random_ltd_class, why_not_itself

    size = Size(length=64, prompt=8, hidden=32, layers=4, vocab=64) if options.quick else Size()
    random_ltd = random_ltd_class()
    dense = Planned(size, 0)
    ways: dict[str, Planned] = {"dense": dense}
    for kind, dense_layers in ((Compact, 0), (PerLayer, 0), (Compact, 1), (PerLayer, 1), (Compact, 2), (random_ltd, 2)):
        ways[f"{kind.name}, {dense_layers} dense"] = kind(size, dense_layers, like=dense.model)
    ways[MaskTheLoss.name] = MaskTheLoss(size, 0, like=dense.model)
    batches = [models.make_batch(size, seed) for seed in range(BATCHES)]
    plans = [random_plan(size, KEEP_RATIO, seed) for seed in range(BATCHES)]
    order, taken = list(ways), []
    seconds = options.seconds or (2 if options.quick else 120)
    for index in rounds_within(3 if options.quick else 40, seconds, name="alternatives"):
        first, which = index % len(order), index % BATCHES
        steps = {name: ways[name].step_on(batches[which], plans[which]) for name in order[first:] + order[:first]}
        if index:
            taken.append(steps)
    work = Work(size, dense.model)
    rows = [_row(name, ways[name], [(one["dense"], one[name]) for one in taken], work) for name in order]
    figures = [figure(row["way"], "step, of dense", row["step_time_share"], beside=_beside(row)) for row in rows[1:]]
    pairs = [(ways[f"{PerLayer.name}, {layers} dense"], ways[f"{Compact.name}, {layers} dense"]) for layers in (0, 1)]
    pairs += [(ways[f"{random_ltd.name}, 2 dense"], ways[f"{Compact.name}, 2 dense"])]
    pairs += [(ways[MaskTheLoss.name], ways[f"{Compact.name}, 1 dense"])]
    names = {id(way): name for name, way in ways.items()}
    against = [_against(names[id(other)], names[id(ours)], taken) for other, ours in pairs]
    for row in against:
        beside = f"decoder alone {row['decoder']['median']:.3f}"
        figures.append(figure(f"{row['other']} ÷ {row['ours']}", "step ratio", row["step"], goal="> 1", beside=beside))
    return {
        "figures": figures,
        "rows": rows,
        "against": against,
        "random_ltd": {"is_deepspeed": "DeepSpeed" in random_ltd.name, "kernels": why_not_itself()},
    }


def _row(name: str, way: Any, pairs: list[tuple[Step, Step]], work: Work) -> dict[str, Any]:
    return {
        "way": name,
        "dense_layers": way.dense_layers,
        "decoder_time_share": spread([own.decoder.cpu / dense.decoder.cpu for dense, own in pairs]),
        "step_time_share": spread([own.total.cpu / dense.total.cpu for dense, own in pairs]),
        "decoder_work_share": work.decoder(pairs[0][1].length, way.dense_layers) / work.decoder(way.size.length, 0),
    }


def _beside(row: dict[str, Any]) -> str:
    return f"decoder {row['decoder_time_share']['median']:.1%}"


def _against(other: str, ours: str, taken: list[dict[str, Step]]) -> dict[str, Any]:
    return {
        "other": other,
        "ours": ours,
        "step": spread([one[other].total.cpu / one[ours].total.cpu for one in taken]),
        "decoder": spread([one[other].decoder.cpu / one[ours].decoder.cpu for one in taken]),
    }


if __name__ == "__main__":
    run_part("alternatives", __doc__, measure)
