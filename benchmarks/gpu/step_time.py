"""Part step_time: dense against sparse on decoders of 1B and 3B parameters, 4k to 16k positions, bf16.

Per setting, pairs of a dense and a sparse step on the same batch (:mod:`.stepping`), medians and quartiles over pairs:

* ``decoder_time_share``, ``decoder_work_share``: sparse ÷ dense; work by the formula of :class:`.work.Work`.
* ``conv`` = (1 − decoder time share) ÷ (1 − decoder work share); the claim is 0.9 or more.
* ``step_conv``: the same for the whole step, LM head counted, planning and learning included.
* ``speedup``: dense ÷ sparse step, without optimizer.
* ``planning_share``: what ReGATE does beside running the model ÷ the sparse step; the claim is 1 % or less.
* ``waits``: operations in a step that make the host wait for the device, dense and sparse, planning included.
* ``peak``: bytes at most in a step, and ``above``: over weights and gradients.

Two controls, for the first setting: ``same_again``, dense ÷ dense decoder time of consecutive steps, and
``against_short``, sparse decoder time without dense layers ÷ that of a plain row as short as the sparse one.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import machine, models
from benchmarks.gpu.results import Results, spread
from benchmarks.gpu.stepping import Step, Stepper, pairs
from benchmarks.gpu.work import Work, conv

LONGEST = 16384  # positions
CONV, PLANNING = 0.9, 0.01  # the claims


@dataclass(frozen=True)
class Setting:
    """One measurement; lengths in positions."""

    size: str
    attention: str
    length: int
    rows: int
    context_share: float = 0.125
    keep_ratio: float = 0.5
    dense_layers: int = 1

    @property
    def name(self) -> str:
        kept = f"keep{self.keep_ratio:g}-n{self.dense_layers}"
        return f"{self.size}-{self.attention}-{self.rows}x{self.length}-context{self.context_share:g}-{kept}"


def settings(rehearsal: bool) -> list[Setting]:
    """What is measured; settings of one model follow each other, the most telling first."""
    if rehearsal:
        plain = [Setting("tiny", "flash", 256, 2), Setting("tiny", "flash", 128, 4, dense_layers=0)]
        return [*plain, Setting("tiny", "flash", 256, 2, context_share=0.5, keep_ratio=0.25)]
    shapes = ((8192, 2), (16384, 1), (4096, 4))
    variants = ({"context_share": 0.5}, {"dense_layers": 0}, {"keep_ratio": 0.25})
    found = [Setting("3B", "te", *shape) for shape in shapes]
    found += [Setting("3B", "te", *shapes[0], **variant) for variant in variants]
    found += [Setting("3B", "flash", *shape) for shape in shapes]
    return found + [Setting("1B", attention, *shape) for attention in ("te", "flash") for shape in shapes]


def run(options: Any, device: torch.device) -> int:
    """The part; returns the exit code."""
    dtype = torch.float32 if options.cpu_rehearsal else torch.bfloat16
    results = Results(options, dtype=str(dtype), conv_claim=CONV, planning_claim=PLANNING, work=Work.__doc__)
    has_te, reason = machine.check_transformer_engine()
    wanted = []
    for setting in settings(options.cpu_rehearsal):
        if setting.attention == "te" and not has_te:
            results.skip(setting.name, reason)
        else:
            wanted.append(setting)
    needs = 2 if options.cpu_rehearsal else 45
    for (size, attention), group in itertools.groupby(wanted, key=lambda s: (s.size, s.attention)):
        model = Lazy(models.SIZES[size], attention, device, dtype)
        for setting in group:
            found = results.measure(setting.name, needs, functools.partial(measure, setting, model, device))
            if found and setting is wanted[0]:
                results.measure("controls", needs, functools.partial(controls, setting, model, device))
        model.drop()
    return results.finish()


class Lazy:
    """A model that is built when first asked for, and leaves the device when dropped."""

    def __init__(self, size: models.Size, attention: str, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self._make, self._model = size, (attention, device, dtype), None

    def get(self) -> Any:
        if self._model is None:
            attention, device, dtype = self._make
            on_gpu = device.type == "cuda"
            config = models.transformer_config(self.size, dtype=dtype, fused=on_gpu, use_cpu_initialization=not on_gpu)
            self._model = models.gpt(self.size, attention, LONGEST, device, config)
        return self._model

    def drop(self) -> None:
        self._model = None
        gc.collect()
        torch.cuda.empty_cache()


def measure(setting: Setting, lazy: Lazy, device: torch.device) -> dict[str, Any]:
    """One setting; see the module's text."""
    model, rows, length, n = lazy.get(), setting.rows, setting.length, setting.dense_layers
    on_gpu = device.type == "cuda"
    batches = [models.text_batch(lazy.size, rows, length, setting.context_share, seed, device) for seed in range(2)]
    stepper = Stepper(model, rows, length, device, keep_ratio=setting.keep_ratio, dense_layers=n)
    try:
        found = pairs(stepper, batches, 12 if on_gpu else 4, time.monotonic() + 30)
        watch = {"waits": True, "saved": not on_gpu}
        watched = {"dense": stepper.dense(batches[0], **watch), "sparse": stepper.sparse(batches[0], **watch)}
    finally:
        stepper.close()
    work = models.work_of(model, rows)
    dense_work, whole_work = work.decoder(length, length, 0), work.step(length, length, 0)
    works = [(work.decoder(length, s.length, n), work.step(length, s.length, n)) for _, s in found]
    ratios = {
        "conv": [conv(s.decoder, d.decoder, w[0], dense_work) for (d, s), w in zip(found, works, strict=True)],
        "step_conv": [conv(s.total, d.total, w[1], whole_work) for (d, s), w in zip(found, works, strict=True)],
        "decoder_time_share": [s.decoder / d.decoder for d, s in found],
        "speedup": [d.total / s.total for d, s in found],
        "planning_share": [s.planning for _, s in found],
        "dense_step_s": [d.total for d, _ in found],
        "dense_decoder_tflops": [dense_work / d.decoder / 1e12 for d, _ in found],
    }
    figures = {name: spread(values) for name, values in ratios.items()}
    figures |= {
        "decoder_work_share": round(statistics.mean(w[0] for w in works) / dense_work, 5),
        "kept_share": round(statistics.mean(s.kept_share for _, s in found), 4),
        "positions_share": round(statistics.mean(s.length for _, s in found) / length, 4),
        "waits": {arm: step.waits for arm, step in watched.items()},
        "peak": memory(found),
        "raw_s": [[round(x, 6) for x in (d.total, d.decoder, s.total, s.decoder)] for d, s in found],
    }
    if not on_gpu:
        figures["saved_bytes"] = {arm: step.saved for arm, step in watched.items()}
    holds = figures["conv"]["median"] >= CONV and figures["planning_share"]["median"] <= PLANNING
    return {"setting": dataclasses.asdict(setting), **figures, "holds": holds if on_gpu else None}


def controls(setting: Setting, lazy: Lazy, device: torch.device) -> dict[str, Any]:
    """How far ratios of equal things are from 1: see the module's text."""
    rows, length = setting.rows, setting.length
    batch = models.text_batch(lazy.size, rows, length, setting.context_share, 0, device)
    stepper = Stepper(lazy.get(), rows, length, device, keep_ratio=setting.keep_ratio, dense_layers=0)
    again, against = [], []
    try:
        stepper.sparse(batch)
        for index in range(-1, 6):
            one, two, sparse = stepper.dense(batch), stepper.dense(batch), stepper.sparse(batch)
            stepper.length = sparse.length
            plain = stepper.dense(models.text_batch(lazy.size, rows, sparse.length, 0, index + 1, device))
            stepper.length = length
            if index >= 0:
                again.append(two.decoder / one.decoder)
                against.append(sparse.decoder / plain.decoder)
    finally:
        stepper.close()
    return {"setting": setting.name, "same_again": spread(again), "against_short": spread(against)}


def memory(found: list[tuple[Step, Step]]) -> Any:
    """Largest peaks of both arms, in bytes; a word where none was measured."""
    if found[0][0].peak.total is None:
        return "not measured on a CPU; see saved_bytes"
    arms = dict(zip(("dense", "sparse"), zip(*found, strict=True), strict=True))
    return {
        f"{arm}_{what}": max(getattr(step.peak, what) for step in steps)
        for arm, steps in arms.items()
        for what in ("total", "above")
    }
