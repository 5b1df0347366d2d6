#!/usr/bin/env python3
"""Balance in seconds: the step time of the slowest data-parallel rank under each budget, on skewed rows.

    python -m benchmarks.slowest_rank             # about two minutes; out/bench/slowest_rank.json
    python -m benchmarks.slowest_rank --quick

Rows come from the skew generator (skew.py), an eighth as long. Every budget plans all ranks of a step with the
planner's own code; then each rank's microbatches run, one rank after the other in this process: forward and backward of
a GPT with one dense layer through the package's hooks, each microbatch at the length its plan says. A rank's time is
the CPU time of its microbatches; a step takes as long as its slowest rank. Nothing else that ranks wait for is
simulated (dealt.py runs four real ranks). Under ``dealt`` the very microbatches of ``per-sample`` lie on other ranks:
their times are measured once and added up for both.

* **slowest rank, of dense**: its time ÷ that of the slowest rank of the dense step, on the same rows.
* **max/mean**: of the ranks' times, beside it that of their positions, which is what the budgets balance.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.measuring import cpu_seconds, figure, rounds_within, run_part, spread
from benchmarks.models import Size

BUDGETS = ("per-sample", "uniform", "balanced")  # and "dealt"
SHRINK, RANKS, MICROBATCHES = 8, 8, 4
MIX_NAMES = ("mixed-instruct", "packed-instruct")


def shrunken(mix: Any, factor: int) -> Any:
    """A mix with everything so many times shorter."""
    import dataclasses

    kinds = tuple(
        dataclasses.replace(
            kind,
            image_length=max(1, kind.image_length // factor),
            prompt=max(1, kind.prompt // factor),
            answer=max(1, kind.answer // factor),
        )
        for kind in mix.kinds
    )
    return dataclasses.replace(mix, kinds=kinds, length=mix.length // factor)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All mixes and budgets, every round on rows of its own."""
    models.start()
    from benchmarks.skew import MIXES

    factor = 64 if options.quick else SHRINK
    ranks = 2 if options.quick else RANKS
    rows = []
    for name in MIX_NAMES:
        mix = shrunken(MIXES[name], factor)
        size = Size(rows=1, length=mix.length, hidden=256, layers=3, vocab=2048)
        if options.quick:
            size = Size(rows=1, length=mix.length, hidden=32, layers=3, vocab=64)
        seconds = (options.seconds or (2 if options.quick else 70)) / len(MIX_NAMES)
        rows += _measure_mix(name, mix, size, ranks, seconds, 3 if options.quick else 20)
    figures = [_figure(row, ranks) for row in rows]
    return {"figures": figures, "rows": rows, "ranks": ranks}


def _measure_mix(name: str, mix: Any, size: Size, ranks: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
    from benchmarks.balance import over_ranks
    from benchmarks.kept import Compact, Planned
    from benchmarks.skew import draw_row, make_rows
    from regate_megatron.method.budget import Alignment
    from regate_megatron.method.deal import deal

    dense = Planned(size, 1)
    runner = Compact(size, 1, like=dense.model)
    batch = models.make_batch(size, seed=0)
    taken: dict[str, list[dict[str, float]]] = {budget: [] for budget in ("dense", *BUDGETS, "dealt")}
    for index in rounds_within(rounds, seconds, name=name):
        rng = np.random.default_rng(index)
        drawn = [[draw_row(mix, rng) for _ in range(MICROBATCHES)] for _ in range(ranks)]
        own = [make_rows(mix, samples, rng, 0.5) for samples in drawn]
        jobs: dict[str, list[list[Any]]] = {"dense": [[None] * MICROBATCHES for _ in own]}
        kept = {"dense": sum(len(rows.score_X) for rows in own)}
        for budget in BUDGETS:
            chosen = over_ranks(own, kind=budget, alignment=Alignment())
            jobs[budget] = [_plans(size, rows, one) for rows, one in zip(own, chosen, strict=True)]
            kept[budget] = sum(int(one.is_kept_X.sum()) for one in chosen)
        ran = {}
        for budget, plans in jobs.items():
            spent_DM = np.array([[_seconds(dense, runner, batch, plan) for plan in of_rank] for of_rank in plans])
            length_DM = np.array([[plan.length if plan else size.length for plan in of_rank] for of_rank in plans])
            ran[budget] = spent_DM, length_DM
        spent_DM, length_DM = ran["per-sample"]
        from_DM = deal(length_DM, np.stack([rows.key_M.numpy() for rows in own])).from_DM
        ran["dealt"], kept["dealt"] = (spent_DM.ravel()[from_DM], length_DM.ravel()[from_DM]), kept["per-sample"]
        for budget, (spent_DM, length_DM) in ran.items():
            spent, lengths = spent_DM.sum(axis=1), length_DM.sum(axis=1)
            if index:
                taken[budget].append(
                    {
                        "slowest": float(spent.max()),
                        "time_spread": float(spent.max() / spent.mean()),
                        "position_spread": float(lengths.max() / lengths.mean()),
                        "positions": int(lengths.sum()) / (ranks * MICROBATCHES * size.length),
                        "kept": kept[budget] / kept["dense"],
                    }
                )
    return [_row(name, budget, taken) for budget in (*BUDGETS, "dealt")]


def _plans(size: Size, rows: Any, chosen: Any) -> list[Any]:
    """The plan of each microbatch of one row: its context first, then its targets.

    Lengths and counts are the planner's; where in the row the targets lie changes no time.
    """
    import torch

    from regate_megatron.method.plan import MicrobatchPlan

    plans = []
    for row, length in enumerate(chosen.length_M.tolist()):
        context, is_kept_T = int(rows.always_R[row]), chosen.is_kept_X[rows.row_X == row]
        kept_1S = torch.zeros(1, size.length, dtype=torch.bool)
        kept_1S[0, :context] = True
        kept_1S[0, context : context + len(is_kept_T)] = is_kept_T
        plans.append(MicrobatchPlan.of(kept_1S, length))
    return plans


def _seconds(dense: Any, runner: Any, batch: dict[str, Any], plan: Any) -> float:
    if plan is None:
        return cpu_seconds(lambda: dense.step(batch))
    # every position has loss in this batch, so the mean over the kept ones is finite whichever they are
    return cpu_seconds(lambda: runner.step_on(batch, plan))


def _row(name: str, budget: str, taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    own, dense = taken[budget], taken["dense"]
    share = [one["slowest"] / other["slowest"] for one, other in zip(own, dense, strict=True)]
    return {
        "mix": name,
        "budget": budget,
        "slowest_share": spread(share),
        "time_max_mean": spread([one["time_spread"] for one in own]),
        "position_max_mean": spread([one["position_spread"] for one in own]),
        "positions_share": float(np.mean([one["positions"] for one in own])),
        "kept_share": float(np.mean([one["kept"] for one in own])),
    }


def _figure(row: dict[str, Any], ranks: int) -> dict[str, Any]:
    beside = (
        f"max/mean of times {row['time_max_mean']['median']:.3f}, of positions"
        f" {row['position_max_mean']['median']:.3f}; positions {row['positions_share']:.1%}, targets kept"
        f" {row['kept_share']:.1%}"
    )
    setting = f"{row['mix']}, {ranks} ranks, {row['budget']}"
    return figure(setting, "slowest rank, of dense", row["slowest_share"], "percent", beside=beside)


if __name__ == "__main__":
    run_part("slowest_rank", __doc__, measure)
