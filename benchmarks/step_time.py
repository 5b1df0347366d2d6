#!/usr/bin/env python3
"""Step time, dense against sparse, on the same data in one run.

    python -m benchmarks.step_time             # about five minutes on one core; out/bench/step_time.json
    python -m benchmarks.step_time --quick     # a smoke test

Every round runs, in rotating order, a plain Megatron step (nothing attached) and one sparse ReGATE step per setting on
the same batch: forward and backward, planning and learning included, score "student", no optimizer (see stepping.py).
Times are CPU seconds on one thread; figures are medians over rounds of the ratio within a round.

* **conv** = (1 − sparse/dense decoder time) ÷ (1 − sparse/dense decoder work): 1 when all work that is left out is time
  that is saved. Work is counted by formula (work.py: MLP and projections linear, attention quadratic, dense layers in
  full). Above 1 where what the formula leaves out (softmax, copies and page faults of K² arrays) shrinks faster.
* **step conv**: the same of the whole step, with LM head and vision tower counted.
* **speedup**: plain step ÷ sparse step, end to end.
* **planning share**: what ReGATE does on the host besides running the model ÷ the sparse step.
* **kept share**: targets that run ÷ targets.

Two controls run in the rounds of the first model: **same again**, a second plain model on the same batch (how far from
1 chance and order take a ratio), and **against short**, sparse decoder time without dense layers ÷ that of a plain
model whose rows are as short as the sparse step's: what the mechanism itself costs, free of how this machine's speed
depends on length.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import models
from benchmarks.measuring import figure, rounds_within, run_part, spread
from benchmarks.models import Size
from benchmarks.stepping import ReGATERunner, Runner, Step
from benchmarks.work import Work

BATCHES = 4  # visited in turn


@dataclass(frozen=True)
class Scene:
    """One model and batch shape, and the settings measured on it.

    Attributes:
        settings: keep ratio and number of dense layers.
        share: of the time there is.
        has_controls: whether the two controls run in its rounds.
    """

    size: Size
    settings: tuple[tuple[float, int], ...]
    share: float
    has_controls: bool = False


HEADLINE = ("GPT", 512, 0.5, 1)  # the package's defaults
SCENES = (
    Scene(Size(), ((0.5, 0), (0.5, 1), (0.5, 2), (0.75, 1), (0.25, 1)), 0.42, has_controls=True),
    Scene(Size(rows=4, length=256, prompt=32), ((0.5, 1),), 0.08),
    Scene(Size(rows=1, length=1024, prompt=128), ((0.5, 1),), 0.1),
    Scene(Size(rows=1, length=2048, prompt=256), ((0.5, 1),), 0.16),
    Scene(Size(image=128), ((0.5, 1), (0.25, 1)), 0.12),
    Scene(Size(rows=1, length=1024, image=256, prompt=128), ((0.5, 1),), 0.12),
)
QUICK = (
    Scene(Size(length=64, prompt=8, hidden=32, layers=3, vocab=64), ((0.5, 0), (0.5, 1)), 0.6, has_controls=True),
    Scene(Size(length=64, image=16, prompt=8, hidden=32, layers=3, vocab=64, vision_layers=1), ((0.5, 1),), 0.4),
)


def measure_scene(scene: Scene, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per setting, and the controls."""
    size = scene.size
    name = f"{size.kind} {size.length}"
    batches = [models.make_batch(size, seed) for seed in range(BATCHES)]
    plain = Runner(size)
    work = Work(size, plain.model)
    runners: dict[Any, Runner] = {"plain": plain}
    for keep_ratio, dense_layers in scene.settings:
        settings = {"keep_ratio": keep_ratio, "dense_layers": dense_layers}
        runners[keep_ratio, dense_layers] = ReGATERunner(size, settings, like=plain.model)
        runners[keep_ratio, dense_layers].step(batches[0])  # dense: losses to rank by
    if scene.has_controls:
        runners["twin"] = Runner(size, like=plain.model)
        length = runners[scene.settings[0]].step(batches[0]).length
        short = replace(size, length=length, prompt=0)
        runners["short"] = _Short(short, models.make_batch(short, seed=9), like=plain.model)
    order, taken = list(runners), []
    for index in rounds_within(rounds, seconds, name=name):
        first = index % len(order)  # nobody always comes first, nor after the same
        turn = (order[first:] + order[:first])[:: 1 if index % 2 else -1]
        steps = {key: runners[key].step(batches[index % BATCHES]) for key in turn}
        if index:
            taken.append(steps)
    rows = [_row(size, work, keep, layers, [(one["plain"], one[keep, layers]) for one in taken])
            for keep, layers in scene.settings]  # fmt: skip
    controls = {}
    if scene.has_controls:
        bare = scene.settings[0]  # without dense layers
        assert bare[1] == 0
        controls = {
            "same again": spread([one["twin"].decoder.cpu / one["plain"].decoder.cpu for one in taken]),
            "against short": spread([one[bare].decoder.cpu / one["short"].decoder.cpu for one in taken]),
        }
    return rows, controls


class _Short(Runner):
    """A plain model on a short batch of its own, whatever batch the others run."""

    def __init__(self, size: Size, batch: dict[str, Any], *, like: Any) -> None:
        super().__init__(size, like=like)
        self._batch = batch

    def step(self, batch: dict[str, Any]) -> Step:
        return super().step(self._batch)


def _row(size: Size, work: Work, keep_ratio: float, dense_layers: int, pairs: list[tuple[Step, Step]]) -> dict:
    """Everything about one setting, from its pairs of (plain step, sparse step)."""
    (length,) = {sparse.length for _, sparse in pairs}  # the rows of a scene are alike
    decoder_work = work.decoder(length, dense_layers) / work.decoder(size.length, 0)
    step_work = work.step(length, dense_layers) / work.step(size.length, 0)
    decoder_time = [sparse.decoder.cpu / plain.decoder.cpu for plain, sparse in pairs]
    step_time = [sparse.total.cpu / plain.total.cpu for plain, sparse in pairs]
    return {
        "model": size.kind,
        "length": size.length,
        "rows": size.rows,
        "keep_ratio": keep_ratio,
        "dense_layers": dense_layers,
        "positions_share": length / size.length,
        "kept_share": sum(sparse.kept_share for _, sparse in pairs) / len(pairs),
        "decoder_work_share": decoder_work,
        "step_work_share": step_work,
        "decoder_time_share": spread(decoder_time),
        "step_time_share": spread(step_time),
        "conv": spread([(1 - share) / (1 - decoder_work) for share in decoder_time]),
        "step_conv": spread([(1 - share) / (1 - step_work) for share in step_time]),
        "speedup": spread([1 / share for share in step_time]),
        "wall_speedup": spread([plain.total.wall / sparse.total.wall for plain, sparse in pairs]),
        "planning_share": spread([sparse.planning.cpu / sparse.total.cpu for _, sparse in pairs]),
        "planning_ms": spread([1000 * sparse.planning.cpu for _, sparse in pairs]),
        "dense_step_s": spread([plain.total.cpu for plain, _ in pairs]),
        "dense_decoder_s": spread([plain.decoder.cpu for plain, _ in pairs]),
    }


def figures_of(rows: list[dict[str, Any]], controls: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """The part's lines of the table."""
    lines = []
    for row in rows:
        setting = f"{row['model']} {row['rows']}x{row['length']}, keep {row['keep_ratio']:g}, "
        setting += f"{row['dense_layers']} of {layers} layers dense"
        beside = (
            f"decoder work {row['decoder_work_share']:.1%}, time {row['decoder_time_share']['median']:.1%};"
            f" step x{row['speedup']['median']:.2f} faster (its work {row['step_work_share']:.1%},"
            f" conv {row['step_conv']['median']:.2f}); planning {row['planning_share']['median']:.2%}"
        )
        lines.append(figure(setting, "conv", row["conv"], goal=">= 0.95", beside=beside))
    for name, found in controls.items():
        lines.append(figure(f"control: {name}", "time ratio", found, goal="1"))
    return lines


def headline_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The headline's figures, and what setting they are of."""
    names = ("model", "length", "keep_ratio", "dense_layers")
    matching = [row for row in rows if tuple(row[name] for name in names) == HEADLINE]
    row = matching[0] if matching else next(row for row in rows if row["dense_layers"] == 1)
    headline = {name: row[name]["median"] for name in ("conv", "planning_share", "speedup")}
    return {
        "headline": {**headline, "kept_share": round(row["kept_share"], 5)},
        "headline_setting": {name: row[name] for name in names},
        "headline_interval": {name: row[name]["interval"] for name in headline},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All scenes."""
    models.start()
    scenes = QUICK if options.quick else SCENES
    seconds = options.seconds or (1 if options.quick else 260)
    rows, controls = [], {}
    for scene in scenes:
        gc.collect()  # the models of the scene before
        found, own = measure_scene(scene, 3 if options.quick else 40, scene.share * seconds)
        rows += found
        controls |= own
    layers = scenes[0].size.layers
    return {"figures": figures_of(rows, controls, layers), **headline_of(rows), "rows": rows, "controls": controls}


if __name__ == "__main__":
    run_part("step_time", __doc__, measure)
