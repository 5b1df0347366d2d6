#!/usr/bin/env python3
"""Step time of rows that are mostly picture: dense, targets left out, visual positions left out, both; in one run.

    python -m benchmarks.visual             # about four minutes on one core; out/bench/visual.json
    python -m benchmarks.visual --quick     # a smoke test

Rows start with their pictures, then 64 positions of prompt and 128 of answer. *Image-like*: one picture of 576 visual
positions. *Video-like*: 16 frames of 128, 2,048 in all; a LLaVAModel takes them as 16 pictures. One decoder layer of
eight is dense, the vision tower runs in full and is trained. The model of the video-like rows has half the width of the
other, for one core's sake: attention is a larger part of it.

Every round runs, in rotating order, a plain Megatron step and one sparse step per setting on the same batch: forward,
backward, planning, learning (score "student" where targets are left out, "random" for visual positions) and AdamW.
Times are CPU seconds on one thread; figures are medians over rounds of the ratio within a round.

* **speedup**: plain step / sparse step, all of it. **Of a cycle**: the same over 128 steps of which 16 are dense.
* **conv**: (1 - sparse/dense decoder time) / (1 - sparse/dense decoder work), as in step_time.py.
* **kept visual**: visual positions that run / visual positions. **Saved**: bytes that autograd keeps for backward.
* **planning alone**: CPU milliseconds of a step's plan on the host, 32 rows of 4,096 visual positions (16 frames), 64
  of prompt and 128 of answer, per rule; pixels as Qwen2.5-VL has them: 4,704 values under a position, all rows alike.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from typing import Any

from benchmarks import models
from benchmarks.measuring import Clock, cpu_seconds, figure, rounds_within, run_part, spread
from benchmarks.memory import SavedBytes
from benchmarks.models import Size
from benchmarks.stepping import ReGATERunner, Runner, Step
from benchmarks.work import Work

BATCHES = 4  # visited in turn
CYCLE, DENSE = 128, 16
LAYERS = 1  # dense ones
TEXT = {"prompt": 64, "layers": 8, "vision_layers": 1}


@dataclass(frozen=True)
class Scene:
    """Rows of one kind; ``share``: of the time there is."""

    name: str
    size: Size
    share: float


SETTINGS = {  # what is left out: shares of targets and of visual positions that run
    "targets": (0.5, 1.0),
    "visual": (1.0, 0.2),
    "both": (0.5, 0.2),
    "both, a tenth": (0.5, 0.1),
}
HEADLINE = ("video-like", "both")
SCENES = (
    Scene("image-like", Size(rows=1, length=768, image=576, **TEXT), 0.4),
    Scene("video-like", Size(rows=1, length=2240, image=2048, frames=16, hidden=256, **TEXT), 0.6),
)
_SMALL = {"rows": 1, "hidden": 32, "layers": 3, "vocab": 64, "vision_layers": 1, "prompt": 4}
QUICK = (
    Scene("image-like", Size(length=48, image=32, **_SMALL), 0.5),
    Scene("video-like", Size(length=80, image=64, frames=4, **_SMALL), 0.5),
)


class Trained:
    """A runner with an optimizer, whose step counts too."""

    def __init__(self, runner: Runner) -> None:
        import torch

        self.runner = runner
        self._optimizer = torch.optim.AdamW(runner.model.parameters(), lr=1e-6)

    def step(self, batch: dict[str, Any]) -> Step:
        """A step from the batch to new weights."""
        done = self.runner.step(batch)
        start = Clock()
        self._optimizer.step()
        done.total = done.total + start.elapsed()
        return done


def measure_scene(scene: Scene, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per setting."""
    size = scene.size
    batches = [models.make_batch(size, seed) for seed in range(BATCHES)]
    plain = Runner(size)
    work = Work(size, plain.model)
    runners = {"plain": Trained(plain)}
    saved = {}
    with SavedBytes(plain.model) as count:
        plain.step(batches[0])
    saved["plain"] = count.bytes
    for name, (keep_ratio, visual_keep_ratio) in SETTINGS.items():
        settings = {"keep_ratio": keep_ratio, "visual_keep_ratio": visual_keep_ratio, "dense_layers": LAYERS}
        runner = ReGATERunner(size, settings, like=plain.model)
        runner.step(batches[0])  # dense: losses to rank by
        with SavedBytes(runner.model) as count:
            runner.step(batches[0])
        saved[name], runners[name] = count.bytes, Trained(runner)
    order, taken = list(runners), []
    for index in rounds_within(rounds, seconds, name=scene.name):
        first = index % len(order)  # nobody always comes first, nor after the same
        turn = (order[first:] + order[:first])[:: 1 if index % 2 else -1]
        steps = {name: runners[name].step(batches[index % BATCHES]) for name in turn}
        if index:
            taken.append(steps)
    return [_row(scene, work, name, taken, saved) for name in SETTINGS]


def _row(scene: Scene, work: Work, name: str, taken: list[dict[str, Step]], saved: dict[str, int]) -> dict[str, Any]:
    """Everything about one setting."""
    size, (keep_ratio, visual_keep_ratio) = scene.size, SETTINGS[name]
    pairs = [(one["plain"], one[name]) for one in taken]
    (length,) = {sparse.length for _, sparse in pairs}  # the rows of a scene are alike
    decoder_work = work.decoder(length, LAYERS) / work.decoder(size.length, 0)
    decoder_time = [sparse.decoder.cpu / plain.decoder.cpu for plain, sparse in pairs]
    step_time = [sparse.total.cpu / plain.total.cpu for plain, sparse in pairs]
    dense_share = DENSE / CYCLE
    return {
        "rows": scene.name,
        "left_out": name,
        "length": size.length,
        "visual": size.image,
        "frames": size.frames,
        "hidden": size.hidden,
        "keep_ratio": keep_ratio,
        "visual_keep_ratio": visual_keep_ratio,
        "dense_layers": LAYERS,
        "positions_share": length / size.length,
        "kept_targets": sum(sparse.kept_share for _, sparse in pairs) / len(pairs),
        "kept_visual": sum(sparse.kept_visual for _, sparse in pairs) / len(pairs),
        "decoder_work_share": decoder_work,
        "decoder_time_share": spread(decoder_time),
        "conv": spread([(1 - share) / (1 - decoder_work) for share in decoder_time]),
        "speedup": spread([1 / share for share in step_time]),
        "cycle_speedup": spread([1 / (dense_share + (1 - dense_share) * share) for share in step_time]),
        "over_targets": spread([one["targets"].total.cpu / one[name].total.cpu for one in taken]),
        "planning_share": spread([sparse.planning.cpu / sparse.total.cpu for _, sparse in pairs]),
        "planning_ms": spread([1000 * sparse.planning.cpu for _, sparse in pairs]),
        "dense_step_s": spread([plain.total.cpu for plain, _ in pairs]),
        "tower_work_share": work.vision_share(size.length, 0),
        "tower_work_share_sparse": work.vision_share(length, LAYERS),
        "tower_work_share_sparse_frozen": work.vision_share(length, LAYERS, is_frozen=True),
        "saved_share": saved[name] / saved["plain"],
    }


def figures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The part's lines of the table."""
    lines = []
    for row in rows:
        setting = f"{row['rows']} 1x{row['length']}, targets {row['keep_ratio']:g}, visual {row['visual_keep_ratio']:g}"
        beside = (
            f"x{row['cycle_speedup']['median']:.2f} over a cycle, x{row['over_targets']['median']:.2f} against targets"
            f" only; decoder work {row['decoder_work_share']:.1%}, time {row['decoder_time_share']['median']:.1%}, conv"
            f" {row['conv']['median']:.2f}; {row['kept_visual']:.1%} of the visual positions kept; tower"
            f" {row['tower_work_share_sparse']:.0%} of the work left; planning {row['planning_share']['median']:.2%};"
            f" saved for backward {row['saved_share']:.0%}"
        )
        goal = ">= 3" if (row["rows"], row["left_out"]) == HEADLINE else ""
        lines.append(figure(setting, "speedup", row["speedup"], goal=goal, beside=beside))
    return lines


def measure_planning(num_rows: int, visual: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a plan per rule where all targets run, and of one rule beside targets ranked by chance."""
    import torch

    from regate_megatron import ReGateConfig
    from regate_megatron.batches import MicrobatchFacts
    from regate_megatron.batches.media import Media, some_of_each
    from regate_megatron.method.visual_scores import VISUAL_SCORES
    from regate_megatron.ranks.topology import Topology
    from regate_megatron.step import step as steps
    from regate_megatron.step.planner import Planner

    patches, (frames, side) = torch.randn(visual, 4704), (16, int((visual // 16) ** 0.5))
    place_1S = torch.arange(visual + 192)[None]
    is_visual_1S, is_target_1S = place_1S < visual, place_1S >= visual + 64

    def facts(row: int) -> MicrobatchFacts:
        key_12 = torch.tensor([[row, 2 * row + 1]])
        media = Media(
            sample_I=torch.tensor([0]),
            count_I=torch.tensor([visual]),
            grid_I3=torch.tensor([[frames, side, side]]),
            pixels=lambda _: some_of_each(patches),
        )
        return MicrobatchFacts(
            is_target_BS=is_target_1S,
            is_context_BS=~is_target_1S,
            is_visual_BS=is_visual_1S,
            media=media,
            token_BS=place_1S,
            position_id_BS=place_1S,
            label_BS=place_1S,
            reference_key_N2=key_12,
            difficulty_key_N2=key_12,
        )

    found = []
    for name, keep_ratio in [*((name, 1.0) for name in VISUAL_SCORES), ("random", 0.5)]:
        config = ReGateConfig(score="random", keep_ratio=keep_ratio, visual_keep_ratio=0.2, visual_score=name)
        planner, times = Planner(config, Topology(0, 1, True, 0, 1, None, None, None), multiple=1), []
        for number in range(rounds + 1):
            step = steps.Step(number, "sparse", elides=True, facts=[facts(row) for row in range(num_rows)])
            times.append(1000 * cpu_seconds(lambda step=step, planner=planner: planner.plan(step)))
        found.append({"visual_score": name, "keep_ratio": keep_ratio, "ms": spread(times[1:])})
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both scenes."""
    models.start()
    scenes = QUICK if options.quick else SCENES
    seconds = options.seconds or (2 if options.quick else 220)
    planning = measure_planning(2, 256, 3) if options.quick else measure_planning(32, 4096, 9)
    rows = []
    for scene in scenes:
        gc.collect()  # the models of the scene before
        rows += measure_scene(scene, 3 if options.quick else 30, scene.share * seconds)
    (head,) = (row for row in rows if (row["rows"], row["left_out"]) == HEADLINE)
    visual = {"speedup": head["speedup"]["median"], "conv": head["conv"]["median"]}
    visual["kept_visual"] = round(head["kept_visual"], 5)
    figures = figures_of(rows)
    for row in planning:
        setting = f"planning alone, {row['visual_score']}" + (" beside targets" if row["keep_ratio"] < 1 else "")
        figures.append(figure(setting, "plan", row["ms"], "ms"))
    return {"figures": figures, "visual": visual, "rows": rows, "planning": planning}


if __name__ == "__main__":
    run_part("visual", __doc__, measure)
