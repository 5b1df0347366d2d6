"""A model that steps, dense or sparse, through Megatron's own schedule; what the parts step_time and fp8 share.

One model serves both arms: a dense step calls Megatron's schedule itself, with ReGATE's hooks in place but idle; a
sparse one calls the wrapped schedule and commits inside the timed stretch. So weights, gradients and the allocator's
state are the same for both. No optimizer runs.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.gpu import models, timing
from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of

ALWAYS_SPARSE = {"score": "student", "warmup_steps": 1, "dense_steps": 0, "cycle_steps": 1}  # after one dense step


@dataclass
class Step:
    """One step as measured; seconds, bytes, positions per row."""

    total: float
    decoder: float
    peak: timing.Peak
    length: int
    kept_share: float = 1.0
    planning: float = 0.0
    waits: int | None = None
    saved: int | None = None


class Stepper:
    """Dense and sparse steps of one model.

    Args:
        model: a GPTModel.
        rows, length: of a batch.
        device: where the model is.
        config: fields of ReGateConfig over :data:`ALWAYS_SPARSE`; the model is attached until :meth:`close`.
    """

    def __init__(self, model: Any, rows: int, length: int, device: torch.device, **config: Any) -> None:
        self.model, self.rows, self.length, self.device = model, rows, length, device
        self.clock = timing.Clock(device)
        attach([model], ReGateConfig(**{**ALWAYS_SPARSE, **config}), pad_token=0)
        self.session = session_of([model])
        self.session.counts_own_steps = False  # we say when, inside the timed stretch
        self.timer = timing.DecoderTimer(model.decoder, self.clock)
        self.schedule = get_forward_backward_func()

    def close(self) -> None:
        """Leave the model as it was."""
        self.timer.remove()
        detach([self.model])

    def dense(self, batch: dict[str, Any], **observe: bool) -> Step:
        """A step of plain Megatron."""
        return self._step(self.schedule, batch, **observe)

    def sparse(self, batch: dict[str, Any], **observe: bool) -> Step:
        """A step of ReGATE: sparse after the first."""
        return self._step(wrap_forward_backward(self.schedule), batch, is_ours=True, **observe)

    def _step(
        self, schedule: Any, batch: dict[str, Any], *, is_ours: bool = False, waits: bool = False, saved: bool = False
    ) -> Step:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        self.clock.settle()
        self.timer.take()
        wall = time.perf_counter()
        with timing.peak_memory(self.device) as peak:
            start = self.clock.mark()
            with contextlib.ExitStack() as watch:
                counted = watch.enter_context(timing.count_waits(self.device)) if waits else []
                kept = watch.enter_context(timing.saved_bytes()) if saved else []
                models.forward_backward(
                    schedule, models.forward_step, self.model, [batch], rows=self.rows, length=self.length
                )
            if is_ours:
                self.session.finish()
            stop = self.clock.mark()
        step = Step(self.clock.seconds(start, stop), self.timer.take(), peak, self.length)
        wall = time.perf_counter() - wall
        step.waits, step.saved = next(iter(counted), None), next(iter(kept), None)
        if is_ours:
            counters = self.session.take_interval()
            step.length = counters.positions_run * self.length // counters.positions_dense
            step.kept_share = counters.targets_kept / counters.targets_total
            step.planning = counters.planning_us / 1e6 / wall  # wall clock, as ReGATE counts it
        return step


def pairs(stepper: Stepper, batches: list[dict[str, Any]], rounds: int, deadline: float) -> list[tuple[Step, Step]]:
    """Pairs (dense, sparse) on the same batch, either first in turn; two rounds before them are thrown away.

    Args:
        rounds: at most.
        deadline: ``time.monotonic()`` after which no pair begins, once there are three.
    """
    stepper.sparse(batches[0])  # the first is dense and gives the planner losses to rank by
    found = []
    for index in range(-2, rounds):
        if len(found) >= 3 and time.monotonic() > deadline:
            break
        batch = batches[index % len(batches)]
        if index % 2:
            sparse, dense = stepper.sparse(batch), stepper.dense(batch)
        else:
            dense, sparse = stepper.dense(batch), stepper.sparse(batch)
        if index >= 0:
            found.append((dense, sparse))
    return found
