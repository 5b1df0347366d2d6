#!/usr/bin/env python3
"""Budgets side by side on real ranks: dense, uniform, balanced and dealt steps of a skewed mix, four CPU ranks.

    python -m benchmarks.dealt               # about four minutes; out/bench/dealt.json
    python -m benchmarks.dealt --quick

Four gloo ranks train a GPT (a mixture of experts under EP) on rows of the mix mixed-instruct (skew.py), an eighth as
long, padded, one row per microbatch, 32 rows per step. Every round gives all arms the same new rows, one arm after the
other, in turn: plain Megatron, and ReGATE with each budget, one dense layer, score "student", from the pulled batch to
what is learned, without optimizer.

* **slowest rank, of dense**: CPU seconds of the rank that spends most, over those of the dense step's. What a rank
  waits for takes no CPU, so other programs on the machine count little; stages that wait for each other are not seen.
* **conv**: time saved ÷ work left out, both of the slowest rank; work is counted by formula (work.py) from the lengths
  that ran. Experts: tokens are taken to be spread evenly over the ranks that share them.
* **max/mean**: positions of the slowest replica over the mean.
* **moving rows**: CPU seconds of dealing, packing, exchange and reading what came, of the slowest rank's step.
* **messages**: what a rank says or waits for on the host in a sparse step, beside the schedule; the largest rank's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.measuring import ROOT, figure, rounds_within, run_part, spread
from benchmarks.models import Size
from benchmarks.work import head_work, layer_work

MIX, SHRINK, ROWS, RANKS = "mixed-instruct", 8, 32, 4
BUDGETS = ("uniform", "balanced", "dealt")
LAYOUTS = {"DP4": {}, "PP2 DP2": {"pipeline_model_parallel_size": 2}, "EP2 DP4": {"expert_model_parallel_size": 2}}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
EXPERTS |= {"moe_token_dispatcher_type": "alltoall", "moe_ffn_hidden_size": 512}
HEADLINE = "DP4"
_LIMIT_S = 400  # of one layout; hung ranks are killed
_TALK = ("all_reduce", "all_gather", "broadcast", "all_to_all_single", "all_gather_object")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All layouts, one after the other."""
    seconds = (options.seconds or (2 if options.quick else 240)) / len(LAYOUTS)
    rows = [row for layout in LAYOUTS for row in _rows(layout, _launch(layout, seconds, options.quick))]
    chosen = {row["budget"]: row for row in rows if row["layout"] == HEADLINE}
    by_layout: dict[str, Any] = {}
    for row in rows:
        found = {name: row[name]["median"] for name in ("slowest_share", "conv", "max_mean", "step_s") if name in row}
        by_layout.setdefault(row["layout"], {})[row["budget"]] = found
    dealt = {
        "slowest_share": chosen["dealt"]["slowest_share"]["median"],
        "max_mean": chosen["dealt"]["max_mean"]["median"],
        "uniform_slowest_share": chosen["uniform"]["slowest_share"]["median"],
        "moving_share": chosen["dealt"]["moving_share"]["median"],
        "by_layout": by_layout,
    }
    return {"figures": [one for row in rows for one in _figures(row)], "rows": rows, "dealt": dealt}


def _launch(layout: str, seconds: float, quick: bool) -> dict[str, Any]:
    """What the ranks of a layout measured.

    Raises:
        SystemExit: a rank failed or hung; what they printed says why.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= {"WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.dealt", "--ranks-of", layout, str(seconds), str(result)]
        command += ["--quick"] * quick
        free.close()
        ranks = [subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank)}) for rank in range(RANKS)]
        end = time.monotonic() + seconds + _LIMIT_S
        try:
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks) or time.monotonic() > end:
                    break
                time.sleep(0.2)
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.wait() for rank in ranks):
            sys.exit(f"benchmarks.dealt: the ranks of {layout} ended with {[rank.returncode for rank in ranks]}")
        return json.loads(result.read_text())


def _rows(layout: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm: every round's figures beside those of its own dense step."""
    rows = []
    for budget in ("dense", *BUDGETS):
        rounds: dict[str, list[float]] = {}
        for one in measured["rounds"]:
            own, dense = one[budget], one["dense"]
            rounds.setdefault("step_s", []).append(max(own["cpu"]))
            if budget == "dense":
                continue
            time_share = max(own["cpu"]) / max(dense["cpu"])
            work_share = max(own["work"]) / max(dense["work"])
            found = {"slowest_share": time_share, "work_share": work_share, "conv": (1 - time_share) / (1 - work_share)}
            found["max_mean"] = max(own["positions"]) * len(own["positions"]) / sum(own["positions"])
            found["planning_share"] = max(own["planning"]) / max(own["cpu"])
            found["moving_share"] = max(own["moving"]) / max(own["cpu"])
            for name, value in found.items():
                rounds.setdefault(name, []).append(value)
        row = {"layout": layout, "budget": budget} | {name: spread(values) for name, values in rounds.items()}
        if budget != "dense":
            row["messages"] = measured["messages"][budget]
        rows.append(row)
    return rows


def _figures(row: dict[str, Any]) -> list[dict[str, Any]]:
    if row["budget"] == "dense":
        return []
    setting = f"{row['layout']}, {row['budget']}"
    beside = (
        f"work {row['work_share']['median']:.1%}; max/mean {row['max_mean']['median']:.3f}; step"
        f" {row['step_s']['median']:.2f} s of CPU, planning {row['planning_share']['median']:.2%}, moving rows"
        f" {row['moving_share']['median']:.2%}; {row['messages']} messages"
    )
    share = figure(setting, "slowest rank, of dense", row["slowest_share"], "percent", beside=beside)
    return [share, figure(setting, "conv", row["conv"], goal=">= 0.9")]


# ---------------------------------------------------------------------------------------------------------- on a rank


class Arm:
    """A model and how its steps run.

    Args:
        budget: None for plain Megatron.
    """

    def __init__(self, size: Size, layout: str, budget: str | None) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from regate_megatron import ReGateConfig, attach, wrap_forward_backward
        from regate_megatron.api import session_of

        self.size, self.budget, self.model, self.session = size, budget, _model(size, layout), None
        self.inside = self.moving = 0.0
        self.run = self._timed(get_forward_backward_func())
        if budget:
            config = {"score": "student", "warmup_steps": 1, "dense_steps": 0, "cycle_steps": 1, "budget": budget}
            attach([self.model], ReGateConfig(**config), pad_token=0)
            self.session = session_of([self.model])
            self.session.counts_own_steps = False
            self.session._deal = self._timed(self.session._deal, "moving")
            self.run = wrap_forward_backward(self.run)

    def step(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        """CPU seconds of a step, and of parts of it."""
        import torch

        for parameter in self.model.parameters():
            parameter.grad = None
        self.inside = self.moving = 0.0
        torch.distributed.barrier()
        start = time.process_time()
        self.run(
            forward_step_func=models.forward_step_for(self.size),
            data_iterator=iter([dict(batch) for batch in batches]),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.size.length,
            micro_batch_size=1,
            forward_only=False,
        )
        lengths = [self.size.length] * len(batches)
        if self.session:
            plan = self.session.step.plan
            lengths = [one.length for one in plan.microbatches] if plan.is_sparse else lengths
            self.session.finish()
        cpu = time.process_time() - start
        return {"cpu": cpu, "planning": cpu - self.inside, "moving": self.moving, "lengths": lengths}

    def _timed(self, work: Any, name: str = "inside") -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = work(*args, **kwargs)
            setattr(self, name, getattr(self, name) + time.process_time() - start)
            return result

        return timed


def _model(size: Size, layout: str) -> Any:
    """This rank's part."""
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    experts = EXPERTS if "EP" in layout else {}
    options = {"pipeline_dtype": torch.float32, **LAYOUTS[layout], **experts}
    config = models.transformer_config(size, **options)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=size.vocab,
        max_sequence_length=size.length,
        position_embedding_type="rope",
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    model.model_type = ModelType.encoder_or_decoder
    return model


def _work(arm: Arm, length_RM: list[list[int]], rank: int) -> float:
    """Operations of a rank's step, by formula.

    Args:
        length_RM: of every rank.
    """
    import torch

    size, model, layers = arm.size, arm.model, arm.model.decoder.layers
    ep = model.config.expert_model_parallel_size
    group = range(rank // ep * ep, rank // ep * ep + ep)  # Megatron numbers them one after the other
    total = 0.0
    for layer in layers:
        parts: dict[bool, int] = {False: 0, True: 0}
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2:
                parts[".experts." in name] += parameter.numel()
        # of the expert layer all tokens of the group run, spread over its ranks; each meets so many experts
        share = EXPERTS["moe_router_topk"] / EXPERTS["num_moe_experts"]
        for micro, own in enumerate(length_RM[rank]):
            is_dense = arm.budget is None or layer.layer_number == 1
            total += layer_work(1, size.length if is_dense else own, size.hidden, parts[False])
            tokens = sum(size.length if is_dense else length_RM[one][micro] for one in group)
            total += 3 * 2 * tokens * parts[True] * share
    if getattr(model, "output_layer", None) is not None and torch.is_tensor(model.output_layer.weight):
        total += sum(head_work(size, own) for own in length_RM[rank])
    return total


def _batches(size: Size, mix: Any, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Rows of the mix: context, targets, padding."""
    import torch

    from benchmarks.skew import draw_row

    batches = []
    for _ in range(count):
        (sample,) = draw_row(mix, rng)
        end = sample.context + sample.targets
        token_1S = torch.from_numpy(rng.integers(1, size.vocab, (1, size.length + 1)))
        token_1S[:, end:] = 0
        mask_1S = torch.zeros(1, size.length)
        mask_1S[:, max(sample.context - 1, 0) : end - 1] = 1
        batch = {"tokens": token_1S[:, :-1].clone(), "labels": token_1S[:, 1:].clone(), "loss_mask": mask_1S}
        batches.append(batch | {"position_ids": torch.arange(size.length)[None]})
    return batches


def on_a_rank(layout: str, seconds: float, result: Path, quick: bool) -> None:
    """Measure; rank 0 writes what all of them found."""
    models.start(**{"pipeline_model_parallel_size": 1, **LAYOUTS[layout]})
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from benchmarks.skew import MIXES
    from benchmarks.slowest_rank import shrunken

    mix = shrunken(MIXES[MIX], 64 if quick else SHRINK)
    size = Size(rows=1, length=mix.length, hidden=32 if quick else 256, layers=4, vocab=64 if quick else 8192)
    arms = {budget or "dense": Arm(size, layout, budget) for budget in (None, *BUDGETS)}
    replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    stage, rank, found = mpu.get_pipeline_model_parallel_rank(), dist.get_rank(), []

    def rows_of(index: int) -> list[dict[str, Any]]:
        return _batches(size, mix, np.random.default_rng([index, replica]), ROWS // replicas)

    began = time.monotonic()
    for index in rounds_within(2 if quick else 20, 1e9, name=layout if rank == 0 else ""):
        goes_on = [index <= 3 or time.monotonic() - began < seconds]
        dist.broadcast_object_list(goes_on, src=0)
        if not goes_on[0]:
            break
        batches, one = rows_of(index), {}
        for name in list(arms)[index % len(arms) :] + list(arms)[: index % len(arms)]:
            own = arms[name].step(batches)
            parts: list = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own | {"replica": replica, "stage": stage})
            length_RM = [part["lengths"] for part in parts]
            works: list = [None] * dist.get_world_size()
            dist.all_gather_object(works, _work(arms[name], length_RM, rank))
            one[name] = {key: [part[key] for part in parts] for key in ("cpu", "planning", "moving")}
            one[name] |= {"work": works, "positions": [sum(part["lengths"]) for part in parts if part["stage"] == 0]}
        if index:  # the first is dense for all, and touches memory for the first time
            found.append(one)
    messages = {name: _messages(arms[name], rows_of(99)) for name in BUDGETS}
    if rank == 0:
        result.write_text(json.dumps({"rounds": found, "messages": messages}))
    dist.barrier()
    dist.destroy_process_group()


def _messages(arm: Arm, batches: list[dict[str, Any]]) -> int:
    """How often a rank talks on the host in a sparse step; of the rank that does most. The schedule is left out."""
    import torch
    import torch.distributed as dist

    said = {True: 0, False: 0}
    is_inside, hooks = [False], arm.session.hooks
    before, run = {name: getattr(dist, name) for name in _TALK}, hooks.run

    def counted(inner: Any) -> Any:
        def talk(*args: Any, **kwargs: Any) -> Any:
            said[is_inside[0]] += 1
            return inner(*args, **kwargs)

        return talk

    def inside(*args: Any, **kwargs: Any) -> Any:
        is_inside[0] = True
        result = run(*args, **kwargs)
        is_inside[0] = False
        return result

    hooks.run = inside
    for name, inner in before.items():
        setattr(dist, name, counted(inner))
    try:
        arm.step(batches)
    finally:
        for name, inner in before.items():
            setattr(dist, name, inner)
        del hooks.run
    most = torch.tensor([said[False]])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def main() -> None:
    """The part; or, where it has started itself, one of the ranks."""
    if "--ranks-of" in sys.argv:
        layout, seconds, result = sys.argv[2:5]
        return on_a_rank(layout, float(seconds), Path(result), "--quick" in sys.argv)
    run_part("dealt", __doc__, measure)
    return None


if __name__ == "__main__":
    main()
