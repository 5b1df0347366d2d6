#!/usr/bin/env python3
"""Planning: what one planner does in a sparse step, up to 1,024 data-parallel ranks and 10^9 targets.

    python -m benchmarks.planning             # about a minute, 4 GB of memory; out/bench/planning.json
    python -m benchmarks.planning --quick

One planner runs the package's own code (`Planner.plan` and `Planner.learn`) on its part of a global batch: 8 rows of
4,096 positions, half of them targets. The other planners are simulated: their numbers are this one's, spread a little,
and they ask this planner for as much as it asks them. So all arithmetic is real and its cost is measured; the time of
the network is not: the table says how many messages and bytes a planner sends instead.

* **10^9 targets**: difficulty of all of them lies on this one planner, a thousand times its share at 1,024 ranks.
* **plan and learn**: CPU milliseconds per sparse step on one thread, beside it the share at most of a step of 1 s.
  Under `dealt` with what all planners do for the deal: every length is another there.
* **a dense step's learn**: the prior of 152,064 token ids learns too.
* **a whole step**: all that a rank which plans for itself does in a sparse step, from the batch it reads to what it
  learns, beside it by stages: *read* the batches, *score* (difficulty and prior fetched), *select*, *plan* (the rest of
  planning), *lay out* (batches elided, `shard_plans`, counting), *learn*. *Exchange* is what planner and receiver add
  in a replica of several ranks: pack, unpack and hash the plan.
* **laying out**: `shard_plans`, on every rank, for one row of 16,384 positions.
* **1,024 ranks ÷ 1**: what the number of planners adds.

The share of a step that planning takes in training is measured by step_time.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import cpu_seconds, figure, rounds_within, run_part, spread
from regate_megatron.batches import GPTBatches
from regate_megatron.batches.facts import MicrobatchFacts
from regate_megatron.config import ReGateConfig
from regate_megatron.decoder import Layout, shard_plans
from regate_megatron.memory.files import Piece
from regate_megatron.memory.records import Records
from regate_megatron.method import selection
from regate_megatron.method.deal import deal
from regate_megatron.method.plan import MicrobatchPlan, StepPlan
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.counters import count_step
from regate_megatron.step.planner import Planner
from regate_megatron.step.step import Step

MICROBATCHES, LENGTH, VOCAB = 8, 4096, 152_064
BUDGETS = ("uniform", "balanced", "per-sample", "dealt")
STEPS = ((8, 4096), (32, 16_384), (64, 512))  # microbatches of one row, positions
STAGES = ("read", "score", "select", "plan", "lay out", "learn")


@dataclasses.dataclass(frozen=True)
class Simulated(Topology):
    """One of ``dp_size`` planners; the others do and say what it does, with lengths spread by a tenth.

    Attributes:
        sent: messages and bytes this planner has sent.
    """

    sent: dict[str, int] = dataclasses.field(default_factory=lambda: {"messages": 0, "bytes": 0})

    @classmethod
    def of(cls, dp_size: int) -> Simulated:
        """Planner 0 of so many."""
        return cls(0, dp_size, True, 0, 1, None, None, None)

    def all_reduce_planners(self, values: Tensor, op: str) -> Tensor:
        """All agree."""
        self._count(2 * (self.dp_size - 1), 2 * values.nbytes)  # a ring
        return values.clone()

    def all_gather_planners(self, values: Tensor) -> Tensor:
        """The others' numbers: this planner's, times 0.9 to 1.1; the last one is a setting, and common."""
        self._count(self.dp_size - 1, (self.dp_size - 1) * values.nbytes)
        factor_D1 = torch.linspace(0.9, 1.1, self.dp_size)[:, None]
        gathered_Dk = (values * factor_D1).long()
        gathered_Dk[0], gathered_Dk[:, -1] = values, values[-1]
        return gathered_Dk

    def exchange_planners(
        self, values_Xx: Tensor, send_D: Tensor, receive_D: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everybody asks this planner for what it asks them."""
        self._count(int((send_D[1:] > 0).sum()), values_Xx.nbytes)
        if receive_D is None:
            self._count(self.dp_size - 1, 8 * (self.dp_size - 1))
        return values_Xx, send_D

    def _count(self, messages: int, num_bytes: int) -> None:
        if self.dp_size > 1:
            self.sent["messages"] += messages
            self.sent["bytes"] += num_bytes


def fill(records: Records, samples: int, per_sample: int) -> np.ndarray:
    """Difficulty of so many samples; returns their keys, int64 [samples, 2]."""
    generator, batch = np.random.default_rng(1), 4096
    key_N2 = generator.integers(-(2**62), 2**62, (samples, 2))
    value_X = generator.random(batch * per_sample, np.float32).astype(np.float16)
    for first in range(0, samples, batch):
        keys = key_N2[first : first + batch]
        counts = np.full(len(keys), per_sample)
        records.append(Piece(keys, counts, np.full(len(keys), first), value_X[: len(keys) * per_sample]))
    return key_N2


def batch_of(keys_N2: np.ndarray, length: int, seed: int) -> list[MicrobatchFacts]:
    """One microbatch per key: the second half of its row is targets."""
    generator, facts = torch.Generator().manual_seed(seed), []
    for key_2 in torch.from_numpy(keys_N2):
        token_BS = torch.randint(0, VOCAB, (1, length), generator=generator)
        is_target_BS = (torch.arange(length) >= length // 2)[None]
        facts.append(
            MicrobatchFacts(
                is_target_BS=is_target_BS,
                is_context_BS=~is_target_BS,
                is_visual_BS=torch.zeros_like(is_target_BS),
                token_BS=token_BS,
                position_id_BS=token_BS,
                label_BS=token_BS,
                reference_key_N2=key_2[None],
                difficulty_key_N2=key_2[None],
            )
        )
    return facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of planners and budgets, in turn; then the layout of one long row."""
    torch.set_num_threads(1)
    length, targets = (256, 10**5) if options.quick else (LENGTH, 10**9)
    sizes = (1, 8) if options.quick else (1, 8, 64, 1024)
    records = Records(1e12)
    key_N2 = fill(records, targets // (length // 2), length // 2)
    cases = {(size, budget): _planner(size, budget, records) for size in sizes for budget in BUDGETS}
    seconds = options.seconds or (2 if options.quick else 45)
    times: dict[tuple[int, str, str], list[float]] = {}
    for index in rounds_within(3 if options.quick else 40, seconds, name="planning"):
        chosen = np.random.default_rng(index).integers(0, len(key_N2), MICROBATCHES)
        for (size, budget), planner in cases.items():
            facts = batch_of(key_N2[chosen], length, index)
            for what, spent in _one_step(planner, facts, index + 1).items():
                if index:
                    times.setdefault((size, budget, what), []).append(1000 * spent)
    rows = []
    for (size, budget), planner in cases.items():
        found = {what: spread(times[size, budget, what]) for what in ("sparse_ms", "dense_learn_ms")}
        over_one = [
            own / one for own, one in zip(times[size, budget, "sparse_ms"], times[1, budget, "sparse_ms"], strict=True)
        ]
        steps = len(over_one) + 1
        sent = {name: round(count / steps) for name, count in planner.topology.sent.items()}
        rows.append({"ranks": size, "budget": budget, **found, "over_one_rank": spread(over_one), "sent": sent})
    layouts = _layouts(1024 if options.quick else 16_384, 3 if options.quick else 20)
    steps = [_whole_step(2, 256, 3)] if options.quick else [_whole_step(*step, 20) for step in STEPS]
    return {
        "figures": _figures(rows, steps, layouts, records.num_targets, length),
        "steps": steps,
        "rows": rows,
        "layouts": layouts,
        "targets": records.num_targets,
        "bytes": records.bytes_used,
    }


def _planner(size: int, budget: str, records: Records) -> Planner:
    planner = Planner(ReGateConfig(score="student", budget=budget), Simulated.of(size), multiple=16)
    planner.learned.adopt(records, planner.learned.prior)
    return planner


def _one_step(planner: Planner, facts: list[MicrobatchFacts], step: int) -> dict[str, float]:
    """CPU seconds of a sparse step's plan and learn, and of a dense step's learn."""
    generator = torch.Generator().manual_seed(step)
    losses = [torch.rand(one.is_target_BS.shape, generator=generator) for one in facts]
    for one in facts:
        assert one.num_target_N is not None  # known to a step before it is planned

    def sparse() -> None:
        one = Step(step, "sparse", elides=True, facts=facts)
        if planner.config.budget == "dealt" and planner.topology.dp_size > 1:
            table_D2M = planner.topology.all_gather_planners(torch.cat(planner.asked(one))).numpy()
            deal(table_D2M[:, : len(facts)], table_D2M[:, len(facts) :])
            one.take_facts(facts)  # as others came
        planner.plan(one)
        planner.learn(one, losses, None)

    spent = cpu_seconds(sparse)
    before = dict(planner.topology.sent)
    dense = cpu_seconds(lambda: planner.learn(Step(step, "dense", elides=False, facts=facts), losses, None))
    planner.topology.sent.update(before)  # what is reported is of sparse steps
    return {"sparse_ms": spent, "dense_learn_ms": dense}


def _whole_step(microbatches: int, length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every stage of a sparse step on one rank; score "regate", rows come back every third step."""
    config, adapter = ReGateConfig(score="regate", teacher_load="student", budget="uniform"), GPTBatches()
    planner = Planner(config, Simulated.of(1), multiple=16)
    layout, device, layers = Layout(), torch.device("cpu"), {"num_layers": 28, "dense_layers": 1}
    times: dict[str, list[float]] = {}
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start, inside = time.process_time(), sum(spent.values())
        result = work(*args, **kwargs)
        inside = sum(spent.values()) - inside  # of stages within this one
        spent[name] = spent.get(name, 0.0) + time.process_time() - start - inside
        return result

    def run_short(step: Step, batches: list[dict[str, Tensor]]) -> None:
        elided = (~step.plan.kept_P).split(step.whole.sizes)
        for batch, elided_Y in zip(batches, elided, strict=True):
            adapter.elide(batch, elided_Y.view_as(batch["loss_mask"]))
        shard_plans(step.plan.microbatches, layout, device, moves_hidden=True, moves_tokens=True)
        count_step(step, **layers)

    planner.sorts[0].score = partial(timed, "score", planner.sorts[0].score)
    with mock.patch.object(selection, "select", partial(timed, "select", selection.select)):
        for index in range(rounds + 3):
            spent.clear()
            batches = _batches(microbatches, length, seed=index % 3)
            facts = timed("read", partial(adapter.read_all, batches))
            reference = [torch.rand(int(count)) for one in facts for count in one.num_target_N]
            step = Step(index, "sparse", elides=True, facts=facts, reference=reference)
            timed("plan", planner.plan, step)
            timed("lay out", run_short, step, batches)
            losses = [torch.rand(1, length) for _ in facts]
            timed("learn", planner.learn, step, losses, None)
            times.setdefault("all", []).append(1000 * sum(spent.values()))
            timed("exchange", lambda plan=step.plan: StepPlan.unpack(plan.pack()).digest())
            for name, seconds in spent.items():
                times.setdefault(name, []).append(1000 * seconds)
    # The first three rounds have new samples.
    return {"microbatches": microbatches, "length": length} | {name: spread(ms[3:]) for name, ms in times.items()}


def _batches(count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows as pretrain_gpt.py has them, the second half targets."""
    generator, mask_1S = torch.Generator().manual_seed(seed), (torch.arange(length) >= length // 2).float()[None]
    token_M1S = torch.randint(0, VOCAB, (count, 1, length), generator=generator)
    return [
        {"tokens": one, "labels": one.roll(-1, 1), "loss_mask": mask_1S, "position_ids": torch.arange(length)[None]}
        for one in token_M1S
    ]


def _layouts(length: int, rounds: int) -> list[dict[str, Any]]:
    """`shard_plans` of one row, of which about half is kept, at a few layouts."""
    kept_1S = torch.zeros(1, length, dtype=torch.bool)
    kept_1S[0, torch.randperm(length, generator=torch.Generator().manual_seed(0))[: 9 * length // 16]] = True
    plan, rows, group = MicrobatchPlan.of(kept_1S, 9 * length // 16), [], object()
    moves = {"moves_hidden": True, "moves_tokens": True}
    for cp_size, sp_size in ((1, 1), (2, 2), (8, 8)):
        shared = {"hidden_group": group, "context_group": group} if cp_size > 1 else {}
        layout = Layout(cp_size=cp_size, sp_size=sp_size, **shared)
        times = [
            1000 * cpu_seconds(lambda layout=layout: shard_plans([plan], layout, torch.device("cpu"), **moves))
            for _ in range(rounds + 1)
        ]
        rows.append({"cp": cp_size, "tp": sp_size, "ms": spread(times[1:])})
    return rows


def _figures(
    rows: list[dict[str, Any]], steps: list[dict[str, Any]], layouts: list[dict[str, Any]], targets: int, length: int
) -> list[dict]:
    most = max(row["ranks"] for row in rows)
    lines = []
    for row in rows:
        if row["ranks"] not in (1, most):
            continue
        setting = f"{row['ranks']:,} ranks, {targets:.0e} targets, {row['budget']}"
        share = row["sparse_ms"]["median"] / 1000
        beside = f"{share:.2%} of a step of 1 s; a dense step's learn {row['dense_learn_ms']['median']:.1f} ms"
        if row["ranks"] > 1:
            beside += (
                f"; x{row['over_one_rank']['median']:.2f} of one rank;"
                f" {row['sent']['messages']:,} messages, {row['sent']['bytes'] / 1024:.0f} KiB"
            )
        what = f"plan and learn, {MICROBATCHES}x{length}"
        lines.append(figure(setting, what, row["sparse_ms"], "ms", goal="<= 1 % of a step", beside=beside))
    for step in steps:
        beside = ", ".join(f"{stage} {step[stage]['median']:.2f}" for stage in (*STAGES, "exchange"))
        what = f"a whole step, {step['microbatches']}x{step['length']}"
        lines.append(figure("1 rank, uniform", what, step["all"], "ms", goal="<= 1 % of a step", beside=beside))
    for row in layouts:
        lines.append(figure(f"TP{row['tp']} CP{row['cp']}, one long row", "laying out", row["ms"], "ms"))
    return lines


if __name__ == "__main__":
    run_part("planning", __doc__, measure)
