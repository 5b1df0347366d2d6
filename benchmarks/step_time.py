#!/usr/bin/env python3
"""Step time, dense against sparse, with Megatron's own models and schedule on one CPU core; `make bench`.

    python benchmarks/step_time.py                    # three to four minutes; results in out/bench/results.json
    python benchmarks/step_time.py --rounds 2         # a smoke test

One process, one rank. Every round runs a plain Megatron step (nothing attached) and then, on the same batch, one
sparse ReGATE step per setting: forward and backward through ``wrap_forward_backward(get_forward_backward_func())`` with
score "student", planning and learning included, no optimizer. Numbers are medians over rounds of the ratio within a
round, with the quartiles; the first round is thrown away.

What is counted:

* **decoder time**: from the call of the transformer block to its return, and in backward from the gradient of its
  output to the gradient of its input; embedding, LM head, loss and vision tower are outside, the compaction is inside.
* **decoder work**: multiply-adds, two operations each, of a layer on K positions per row: ``2 · rows · K · weights`` in
  its linear layers and ``4 · rows · H · K²`` in attention: the whole square, because Megatron's local CPU attention
  computes all of it and masks. Backward counts twice. The dense layers count in full; softmax, norms and rotary are not
  counted.
* **conv** = (1 − sparse/dense decoder time) ÷ (1 − sparse/dense decoder work): 1 when all work that is left out is time
  that is saved; above 1 where what is not counted (softmax, copies and page faults of K² arrays) shrinks faster than
  the work.
* **speedup**: plain step ÷ sparse step, end to end.
* **planning_share**: what ReGATE does besides running the model (reading the batch, scoring, selecting, learning) ÷ the
  sparse step.
* **kept_share**: targets that run in a sparse step ÷ targets; **positions_share**: positions that run after the dense
  layers ÷ positions.

Two controls run in every GPT round: **same again**, a second plain model on the same batch (how far from 1 chance and
order take a ratio), and **against short**, sparse decoder time without dense layers ÷ that of a plain model whose rows
are as short as the sparse step's: what the mechanism itself costs, free of how this machine's speed depends on length.

Times are CPU seconds of this process, on one thread: the same on a busy machine, where wall clock would measure the
neighbours. Wall-clock figures are in the results beside them (``wall_…``).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

from regate_megatron import emulation

emulation.set_environment()

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, LAYERS, HEADS, VOCAB = 512, 8, 4, 2048
ROWS, LENGTH, IMAGE = 2, 512, 128  # per microbatch; merged positions; visual ones of them in the LLaVA batch
KEEP_RATIOS, DENSE_LAYERS = (0.5, 0.25), (0, 1)
BATCHES = 4  # visited in turn
HEADLINE = {"model": "gpt", "keep_ratio": 0.5, "dense_layers": 1}  # the package's defaults
CONTROLLED = {"model": "gpt", "keep_ratio": 0.5, "dense_layers": 0}  # no dense layers: comparable with short rows


@dataclass
class Clock:
    """CPU and wall-clock seconds since the start of something."""

    cpu: float = field(default_factory=time.process_time)
    wall: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> Clock:
        return Clock(time.process_time() - self.cpu, time.perf_counter() - self.wall)


@dataclass
class Step:
    """One timed step."""

    total: Clock
    decoder: Clock
    planning_ms: float = 0.0
    length: int = LENGTH
    kept_share: float = 1.0


class DecoderTimer:
    """Sums the time inside a transformer block, forward and backward."""

    def __init__(self, block: Any) -> None:
        self.spent = Clock(0.0, 0.0)
        self._start = Clock()
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave)

    def _enter(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["hidden_states"].register_hook(lambda gradient: self._stop())
        self._go()

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        self._stop()
        output.register_hook(lambda gradient: self._go())

    def _go(self) -> None:
        self._start = Clock()

    def _stop(self) -> None:
        elapsed = self._start.elapsed()
        self.spent = Clock(self.spent.cpu + elapsed.cpu, self.spent.wall + elapsed.wall)


class Runner:
    """One model and how to run a step of it; with a ReGATE setting unless ``config`` is None."""

    def __init__(self, build: Callable[[], Any], forward_step: Callable[..., Any], config: Any = None) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from regate_megatron import attach, wrap_forward_backward
        from regate_megatron.api import session_of

        self.model, self.forward_step, self.session = build(), forward_step, None
        self.model.model_type = ModelType.encoder_or_decoder  # as megatron.training sets it
        self.schedule = get_forward_backward_func()
        if config is not None:
            attach([self.model], config)
            self.session = session_of([self.model])
            self.session.counts_own_steps = False  # we say when, inside the timed stretch
            self.schedule = wrap_forward_backward(self.schedule)
        self.timer = DecoderTimer(language_model(self.model).decoder)

    def step(self, batch: dict[str, Any]) -> Step:
        from regate_megatron.metrics import Counters

        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        self.timer.spent = Clock(0.0, 0.0)
        start = Clock()
        self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        if self.session is None:
            return Step(start.elapsed(), self.timer.spent)
        self.session.commit()
        total = start.elapsed()
        counters, self.session.interval = self.session.interval, Counters()
        return Step(
            total,
            self.timer.spent,
            planning_ms=counters.planning_ms,
            length=counters.positions_run * LENGTH // counters.positions_dense,
            kept_share=counters.targets_kept / counters.targets_total,
        )


def decoder_work(length: int, dense_layers: int, weights_per_layer: int) -> float:
    """Operations of one step in the decoder, forward and backward; see the module's text."""

    def layer(positions: int) -> float:
        return 3 * ROWS * (2 * positions * weights_per_layer + 4 * HIDDEN * positions**2)

    return dense_layers * layer(LENGTH) + (LAYERS - dense_layers) * layer(length)


def measure(
    name: str, settings: list[dict[str, Any]], rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run one model with all settings; returns one row per setting, and the controls.

    Args:
        rounds: rounds at most, the thrown-away one not counted.
        seconds: wall-clock seconds after which no round begins (three run in any case).
    """
    import torch
    from tqdm import tqdm

    from regate_megatron import ReGateConfig

    build, forward_step, batches = MODELS[name]()
    first = build()
    weights_per_layer = sum(p.numel() for p in language_model(first).decoder.layers[0].parameters() if p.dim() == 2)
    dense = Runner(lambda: first, forward_step)
    # One dense step each gives the planner losses to rank by; then every step is sparse.
    always = {"score": "student", "warmup_steps": 1, "dense_steps": 0, "cycle_steps": 1}
    runners = [
        Runner(lambda: _like(first, build), forward_step, ReGateConfig(**always, **setting)) for setting in settings
    ]
    for runner in runners:
        runner.step(batches[0])
    twin = Runner(lambda: _like(first, build), forward_step) if name == CONTROLLED["model"] else None
    pairs: list[list[tuple[Step, Step]]] = [[] for _ in settings]
    controls: dict[str, list[float]] = {"same_again": [], "against_short": []}
    begin = time.perf_counter()
    for index in tqdm(range(rounds + 1), desc=name, unit="round", disable=None):
        if index > 3 and time.perf_counter() - begin > seconds:
            break
        batch = batches[index % len(batches)]
        plain = dense.step(batch)
        steps = [runner.step(batch) for runner in runners]
        if index == 0:  # touches memory for the first time
            continue
        if twin:
            sparse = steps[settings.index({key: CONTROLLED[key] for key in settings[0]})]
            controls["same_again"].append(twin.step(batch).decoder.cpu / plain.decoder.cpu)
            short = twin.step(text_batch(sparse.length, 0, torch.Generator().manual_seed(index)))
            controls["against_short"].append(sparse.decoder.cpu / short.decoder.cpu)
        for own, step in zip(pairs, steps, strict=True):
            own.append((plain, step))
    assert torch.get_num_threads() == 1
    rows = [
        {"model": name, **setting, **summary(own, setting["dense_layers"], weights_per_layer)}
        for setting, own in zip(settings, pairs, strict=True)
    ]
    return rows, with_quartiles(controls) if twin else {}


def summary(pairs: list[tuple[Step, Step]], dense_layers: int, weights_per_layer: int) -> dict[str, Any]:
    """Medians and quartiles over the pairs (plain step, sparse step) of one setting."""
    dense_work = decoder_work(LENGTH, 0, weights_per_layer)

    def conv(plain: Step, sparse: Step, clock: str) -> float:
        work = decoder_work(sparse.length, dense_layers, weights_per_layer) / dense_work
        return (1 - getattr(sparse.decoder, clock) / getattr(plain.decoder, clock)) / (1 - work)

    result: dict[str, Any] = {
        "rounds": len(pairs),
        "positions_share": statistics.mean(sparse.length for _, sparse in pairs) / LENGTH,
        "kept_share": statistics.mean(sparse.kept_share for _, sparse in pairs),
        "work_share": statistics.mean(decoder_work(s.length, dense_layers, weights_per_layer) for _, s in pairs)
        / dense_work,
    }
    measured = {
        "decoder_time_share": [sparse.decoder.cpu / plain.decoder.cpu for plain, sparse in pairs],
        "conv": [conv(plain, sparse, "cpu") for plain, sparse in pairs],
        "speedup": [plain.total.cpu / sparse.total.cpu for plain, sparse in pairs],
        "wall_conv": [conv(plain, sparse, "wall") for plain, sparse in pairs],
        "wall_speedup": [plain.total.wall / sparse.total.wall for plain, sparse in pairs],
        # ReGATE's own counter is wall clock, so the step is too.
        "planning_share": [sparse.planning_ms / 1000 / sparse.total.wall for _, sparse in pairs],
        "dense_step_s": [plain.total.cpu for plain, _ in pairs],
        "dense_decoder_s": [plain.decoder.cpu for plain, _ in pairs],
    }
    return {name: round(value, 5) for name, value in result.items()} | with_quartiles(measured)


def with_quartiles(measured: dict[str, list[float]]) -> dict[str, Any]:
    """The median of each list under its name, the quartiles under ``…_quartiles``."""
    result: dict[str, Any] = {}
    for name, values in measured.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = round(middle, 5)
        result[f"{name}_quartiles"] = [round(low, 5), round(high, 5)]
    return result


def gpt() -> tuple[Callable[[], Any], Callable[..., Any], list[dict[str, Any]]]:
    """A GPTModel; rows of one eighth prompt and seven eighths targets."""
    import torch
    from megatron.core.models.gpt import GPTModel

    def build() -> Any:
        return GPTModel(
            config=transformer_config(),
            transformer_layer_spec=layer_spec(),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
        )

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, lambda output: mean_loss(output, batch["loss_mask"])

    batches = [text_batch(LENGTH, LENGTH // 8, torch.Generator().manual_seed(index)) for index in range(BATCHES)]
    return build, forward_step, batches


def llava() -> tuple[Callable[[], Any], Callable[..., Any], list[dict[str, Any]]]:
    """A LLaVAModel with a small vision tower; rows of one image, one eighth prompt, the rest targets."""
    import torch
    from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    patch, (height, width) = 14, (8, IMAGE // 8)
    text = LENGTH - IMAGE + 1  # the placeholder is one token

    def build() -> Any:
        vision = transformer_config()
        vision.num_layers, vision.vision_model_type = 2, "clip"
        return LLaVAModel(
            language_transformer_config=transformer_config(),
            language_transformer_layer_spec=layer_spec(),
            language_vocab_size=VOCAB,
            language_max_sequence_length=LENGTH,
            vision_transformer_config=vision,
            vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
            drop_vision_class_token=True,
            vision_projection_config=transformer_config(),
            vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            language_position_embedding_type="rope",
            img_h=height * patch,
            img_w=width * patch,
            patch_dim=patch,
        )

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        losses, loss_mask = model(
            batch["image"], batch["tokens"], batch["position_ids"], None, batch["labels"], batch["loss_mask"]
        )
        return losses, lambda output: mean_loss(output, loss_mask)

    batches = []
    for index in range(BATCHES):
        generator = torch.Generator().manual_seed(index)
        batch = text_batch(text, 1 + LENGTH // 8, generator)
        batch["tokens"][:, 0] = DEFAULT_IMAGE_TOKEN_INDEX
        batch["image"] = torch.randn(ROWS, 3, height * patch, width * patch, generator=generator)
        batches.append(batch)
    return build, forward_step, batches


MODELS = {"gpt": gpt, "llava": llava}


def text_batch(length: int, prompt: int, generator: Any) -> dict[str, Any]:
    """Random tokens; the first ``prompt`` positions have no loss."""
    import torch

    token_BS = torch.randint(0, VOCAB, (ROWS, length + 1), generator=generator)
    loss_mask_BS = torch.ones(ROWS, length)
    loss_mask_BS[:, :prompt] = 0
    return {
        "tokens": token_BS[:, :-1].contiguous(),
        "labels": token_BS[:, 1:].contiguous(),
        "loss_mask": loss_mask_BS,
        "position_ids": torch.arange(length).expand(ROWS, -1).contiguous(),
    }


def mean_loss(output: Any, loss_mask: Any) -> tuple[Any, dict[str, Any]]:
    """Mean over the targets in the mask."""
    loss = (output.float() * loss_mask).sum() / loss_mask.sum()
    return loss, {"lm loss": loss.detach()}


def transformer_config() -> Any:
    """The decoder: SwiGLU, RMSNorm and grouped queries, as in the models of today."""
    import torch
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=4 * HIDDEN,
        num_attention_heads=HEADS,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def layer_spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization="RMSNorm")


def language_model(model: Any) -> Any:
    return getattr(model, "language_model", model)


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no names of hosts or people."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((row.split(":")[1].strip() for row in info.read_text().splitlines() if "model name" in row), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "precision": "float32",
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Aside first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".incomplete")
    aside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(aside, path)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    head = f"{'model':6} {'keep':>5} {'dense':>6} {'kept':>6} {'positions':>9} {'work':>6} {'time':>6}"
    head += f"  {'conv (quartiles)':20}  {'speedup (quartiles)':20}  {'planning':>8}  rounds"
    lines = [head]
    for row in rows:
        low, high = row["conv_quartiles"]
        slow, fast = row["speedup_quartiles"]
        lines.append(
            f"{row['model']:6} {row['keep_ratio']:5.2f} {row['dense_layers']:2d} of {LAYERS} {row['kept_share']:6.1%}"
            f" {row['positions_share']:9.1%} {row['work_share']:6.1%} {row['decoder_time_share']:6.1%}"
            f"  {row['conv']:.3f} ({low:.3f}-{high:.3f})   {row['speedup']:.3f} ({slow:.3f}-{fast:.3f})"
            f"   {row['planning_share']:8.2%}  {row['rounds']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds at most, per model (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=100, help="begin no round after this; half of it for LLaVA")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench" / "results.json", metavar="FILE")
    options = parser.parse_args()
    emulation.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    settings = [{"keep_ratio": keep, "dense_layers": layers} for keep in KEEP_RATIOS for layers in DENSE_LAYERS]
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # GPTModel is deprecated, says every model
    print(f"decoder: {LAYERS} layers, hidden {HIDDEN}; {ROWS} rows of {LENGTH} positions; {machine()}")
    print("time: CPU seconds, decoder forward + backward; work: linear layers and full-square attention; see --help")
    rows, controls = measure("gpt", settings, options.rounds, options.seconds)
    rows += measure("llava", [s for s in settings if s["dense_layers"] == 1], options.rounds, options.seconds / 2)[0]
    print(table(rows))
    print("controls (gpt): same again {same_again:.3f}, against short {against_short:.3f}".format(**controls))
    best = next(row for row in rows if HEADLINE.items() <= row.items())
    names = ("conv", "planning_share", "speedup", "kept_share")
    headline = {name: best[name] for name in names}
    results = {
        "headline": headline,
        "headline_setting": HEADLINE,
        "rows": rows,
        "controls": controls,
        "machine": machine(),
        "decoder": {"layers": LAYERS, "hidden": HIDDEN, "rows": ROWS, "positions": LENGTH},
    }
    write_results(options.out, results)
    print("headline (gpt, keep 0.5, 1 dense layer): " + ", ".join(f"{k} {v:.3f}" for k, v in headline.items()))
    print(f"wrote {options.out}")
    torch.distributed.destroy_process_group()


def _like(model: Any, build: Callable[[], Any]) -> Any:
    """A second model with the same weights."""
    twin = build()
    twin.load_state_dict(copy.copy(model.state_dict()))
    return twin


if __name__ == "__main__":
    main()
