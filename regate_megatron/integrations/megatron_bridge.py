"""Megatron-Bridge's training loop: one callback, and one name that the loop reads before any callback runs.

    from regate_megatron.integrations import megatron_bridge
    pretrain(config, forward_step, callbacks=[megatron_bridge.install(ReGateConfig(keep_ratio=0.5, …))])

The callback does nearly all: ``on_train_start`` attaches (weights are loaded by then, no step has run; a pre-wrap hook
would come before the checkpoint and before LoRA), ``on_train_step_end`` says whether the step counted and logs,
``on_train_end`` detaches. The schedule has no hook: ``train`` asks ``get_forward_backward_func``, which
``megatron.bridge.training.train`` imported by name; that one name is patched and put back by :func:`uninstall`.
Evaluation asks another module's copy of the name and is not touched.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.bridge.training import train as loop
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils.common_utils import print_rank_0, print_rank_last

from regate_megatron.api import attach, detach, session_of, wrap_forward_backward
from regate_megatron.checkpoint import save_language_model
from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.errors import one_line_refusals, refuse
from regate_megatron.integrations.megatron_lm import attached_line
from regate_megatron.metrics import Counters, log_line, ratios, reduce_counters
from regate_megatron.teacher.source import TEACHER_FOLDER, teacher_of_resumed_run

_SCHEDULE = "get_forward_backward_func"
_MARK = "_regate"


def install(config: ReGateConfig, *, pad_token: int | None = None) -> ReGateCallback:
    """Make Bridge's loop ask for our schedule; returns the callback for ``pretrain`` or ``finetune``. Any rank.

    Args:
        config: the settings.
        pad_token: the tokenizer's pad id, for ``teacher_visual="pad"``.
    """
    uninstall()
    inner = getattr(loop, _SCHEDULE)

    @functools.wraps(inner)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = wrap_forward_backward(inner(*args, **kwargs))

        def forward_backward(**arguments: Any) -> Any:
            with one_line_refusals():
                return schedule(**arguments)

        return forward_backward

    setattr(get_forward_backward_func, _MARK, True)
    setattr(loop, _SCHEDULE, get_forward_backward_func)
    # The loop must read its globals from the module patched here, or the patch would be for nobody.
    assert inspect.unwrap(loop.train).__globals__[_SCHEDULE] is get_forward_backward_func
    return ReGateCallback(config, pad_token)


def uninstall() -> None:
    """Put the original function back."""
    patched = getattr(loop, _SCHEDULE)
    if getattr(patched, _MARK, False):
        setattr(loop, _SCHEDULE, patched.__wrapped__)


class ReGateCallback(Callback):
    """ReGATE in Bridge's events; made by :func:`install`."""

    def __init__(self, config: ReGateConfig, pad_token: int | None) -> None:
        self.config, self.pad_token = config, pad_token

    def on_train_start(self, context: CallbackContext) -> None:
        """Attach; all ranks call this, in step. A refusal ends the process with one line."""
        with one_line_refusals():
            self._attach(context)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Plans are a function of the step, also where Bridge skipped some."""
        session_of(context.model).step = context.state.train_state.step

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Learn from a step that counted, forget one that did not; log."""
        session = session_of(context.model)
        assert session.has_step, "the training loop ran a schedule that was not wrapped"
        session.discard() if context.skipped_iter else session.commit()
        iteration = context.state.train_state.step + 1
        if iteration % context.state.cfg.logger.log_interval == 0 and session.interval.steps:
            self._log(context.state, session, iteration)

    def on_train_end(self, context: CallbackContext) -> None:
        """Leave the model and the loop as they were."""
        detach(context.model)
        uninstall()

    def _attach(self, context: CallbackContext) -> None:
        state, settings = context.state, context.state.cfg
        if settings.peft is not None and self.config.needs_teacher and self.config.teacher_load == STUDENT_AS_TEACHER:
            error = refuse(
                flag("teacher_load"),
                given="student with adapters (peft)",
                allowed="a checkpoint of the base language model",
                change="teacher_load to the text backbone's torch_dist checkpoint",
            )
            error.everywhere = True
            raise error
        options = _options(state)
        attach(
            context.model, self.config, args=options, pad_token=self.pad_token, vocab_size=state.tokenizer.vocab_size
        )
        session = session_of(context.model)
        session.counts_own_steps = False
        session.prepare(options.micro_batch_size)
        if options.iteration:
            session.resume(options.iteration)
        if self.config.needs_teacher and self.config.teacher_load == STUDENT_AS_TEACHER and options.save:
            target, resumed = Path(options.save) / TEACHER_FOLDER, teacher_of_resumed_run(options)
            if resumed is None or resumed.resolve() != target.resolve():
                save_language_model(session.reference.teacher, target, session.topology.world_group)
        print_rank_0(attached_line(session))

    @staticmethod
    def _log(state: Any, session: Any, iteration: int) -> None:
        interval = reduce_counters(session.interval, session.topology)
        total = reduce_counters(session.totals, session.topology)
        session.interval = Counters()
        print_rank_last(log_line(iteration, session.phase, interval, total))
        if state.tensorboard_logger:
            for name, value in ratios(interval).items():
                state.tensorboard_logger.add_scalar(name, value, iteration)
        if state.wandb_logger:
            state.wandb_logger.log(ratios(interval), iteration)


def _options(state: Any) -> SimpleNamespace:
    """What the checks read from Megatron-LM's namespace, from Bridge's config."""
    settings, data = state.cfg, state.cfg.dataset
    packs = ("enable_offline_packing", "enable_in_batch_packing")
    return SimpleNamespace(
        load=settings.checkpoint.load,
        save=settings.checkpoint.save,
        iteration=state.train_state.step,
        micro_batch_size=settings.train.micro_batch_size,
        sft=any(getattr(data, name, False) for name in packs),
        reset_attention_mask=getattr(data, "reset_attention_mask", False),
        use_megatron_fsdp=settings.dist.use_megatron_fsdp,
        use_torch_fsdp2=settings.dist.use_torch_fsdp2,
    )
