"""One timed training step: forward and backward through Megatron's own schedule, no optimizer.

What is counted apart:

* **decoder**: from the call of the transformer block to its return, and in backward from the gradient of its output to
  the gradient of its input; embedding, LM head, loss and vision tower are outside, the compaction is inside.
* **planning**: all that a wrapped step does outside the framework's schedule (reading the batch, scoring, selecting,
  exchanging, laying out positions, editing the loss mask, learning), which runs on the host before and after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measuring import Clock
from benchmarks.models import Size, build, decoder_of, forward_step_for


@dataclass
class Step:
    """One timed step.

    Attributes:
        total, decoder, planning: what they took.
        length: positions a row ran after the dense layers.
        kept_share: targets that ran ÷ targets.
        kept_visual: visual positions that ran ÷ visual positions.
    """

    total: Clock
    decoder: Clock
    length: int
    planning: Clock = field(default_factory=lambda: Clock(0.0, 0.0))
    kept_share: float = 1.0
    kept_visual: float = 1.0


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
        self.spent = self.spent + self._start.elapsed()


class Runner:
    """One model and how to run a step of it.

    Args:
        size: the model's.
        like: another model of this size, whose weights it gets.
    """

    def __init__(self, size: Size, *, like: Any = None) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.size, self.model = size, build(size)
        if like is not None:
            self.model.load_state_dict(copy.copy(like.state_dict()))
        self.forward_step = forward_step_for(size)
        self.schedule = get_forward_backward_func()
        self.timer = DecoderTimer(decoder_of(self.model))

    def step(self, batch: dict[str, Any]) -> Step:
        """A plain Megatron step."""
        self._clear()
        start = Clock()
        self._run(batch, self.schedule)
        return Step(start.elapsed(), self.timer.spent, self.size.length)

    def _clear(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        self.timer.spent = Clock(0.0, 0.0)

    def _run(self, batch: dict[str, Any], schedule: Callable[..., Any]) -> Any:
        return schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter([batch]),
            model=[self.model],
            num_microbatches=1,
            seq_length=self.size.length,
            micro_batch_size=self.size.rows,
            forward_only=False,
        )


class ReGATERunner(Runner):
    """A model with ReGATE attached: every step after the first is sparse, planned and learned from.

    Args:
        settings: of :class:`ReGateConfig`; score "student" unless it says otherwise.
    """

    def __init__(self, size: Size, settings: dict[str, Any], *, like: Any) -> None:
        from regate_megatron import ReGateConfig, attach, wrap_forward_backward
        from regate_megatron.api import session_of

        super().__init__(size, like=like)
        always = {"score": "student", "warmup_steps": 1, "dense_steps": 0, "cycle_steps": 1}
        attach([self.model], ReGateConfig(**{**always, **settings}))
        self.session = session_of([self.model])
        self.session.counts_own_steps = False  # we say when, inside the timed stretch
        self._inside = Clock(0.0, 0.0)
        self._wrapped = wrap_forward_backward(self._timed(self.schedule))

    def step(self, batch: dict[str, Any]) -> Step:
        """A step of ReGATE."""
        self._clear()
        start = Clock()
        self._run(batch, self._wrapped)
        self.session.finish()
        total = start.elapsed()
        counters = self.session.take_interval()
        return Step(
            total,
            self.timer.spent,
            planning=total - self._inside,
            length=counters.positions_run * self.size.length // counters.positions_dense,
            kept_share=counters.targets_kept / counters.targets_total,
            kept_visual=counters.visual_kept / max(counters.visual_total, 1),
        )

    def _timed(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def timed(**arguments: Any) -> Any:
            start = Clock()
            result = schedule(**arguments)
            self._inside = start.elapsed()
            return result

        return timed
