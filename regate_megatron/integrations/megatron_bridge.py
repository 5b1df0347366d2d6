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
from types import SimpleNamespace
from typing import Any

from megatron.bridge.training import train as loop
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils.common_utils import print_rank_0, print_rank_last

from regate_megatron.api import attach, detach, session_of, wrap_forward_backward
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import one_line_refusals, refuse
from regate_megatron.integrations.megatron_lm import attached_line, keep_teacher, report

_SCHEDULE, _MARK = "get_forward_backward_func", "_regate"


def install(config: ReGateConfig, *, pad_token: int | None = None) -> Callback:
    """Make Bridge's loop ask for our schedule; returns the callback for ``pretrain`` or ``finetune``. Any rank.

    Args:
        config: the settings.
        pad_token: the tokenizer's pad id, for ``teacher_visual="pad"``.
    """
    uninstall()
    inner = getattr(loop, _SCHEDULE)

    @functools.wraps(inner)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        # A refusal in a step would otherwise be a traceback of Bridge's on every rank.
        return one_line_refusals()(wrap_forward_backward(inner(*args, **kwargs)))

    setattr(get_forward_backward_func, _MARK, True)
    setattr(loop, _SCHEDULE, get_forward_backward_func)
    # The loop must read its globals from the module patched here, or the patch would be for nobody.
    assert inspect.unwrap(loop.train).__globals__[_SCHEDULE] is get_forward_backward_func
    return _ReGateCallback(config, pad_token)


def uninstall() -> None:
    """Put the original function back."""
    patched = getattr(loop, _SCHEDULE)
    if getattr(patched, _MARK, False):
        setattr(loop, _SCHEDULE, patched.__wrapped__)


class _ReGateCallback(Callback):
    def __init__(self, config: ReGateConfig, pad_token: int | None) -> None:
        self.config, self.pad_token = config, pad_token

    @one_line_refusals()
    def on_train_start(self, context: CallbackContext) -> None:
        _check(context.state.cfg)
        options, size = _options(context.state), context.state.tokenizer.vocab_size
        attach(context.model, self.config, args=options, pad_token=self.pad_token, vocab_size=size)
        session = session_of(context.model)
        if session is None:
            return  # the settings say off
        session.counts_own_steps = False
        session.prepare(options.micro_batch_size)
        if options.iteration:
            session.resume(options.iteration)
        keep_teacher(session, options)
        print_rank_0(attached_line(session))

    def on_train_step_start(self, context: CallbackContext) -> None:
        if session := session_of(context.model):
            session.step = context.state.train_state.step  # Bridge may have skipped some

    def on_train_step_end(self, context: CallbackContext) -> None:
        state, session = context.state, session_of(context.model)
        if session is None:
            return
        assert session.has_step, "the training loop ran a schedule that was not wrapped"
        session.discard() if context.skipped_iter else session.commit()
        iteration = state.train_state.step + 1
        if iteration % state.cfg.logger.log_interval == 0 and session.interval.steps:
            report(session, iteration, print_rank_last, state.tensorboard_logger, state.wandb_logger)

    def on_train_end(self, context: CallbackContext) -> None:
        detach(context.model)
        uninstall()


def _check(settings: Any) -> None:
    """Refuse what Bridge's settings alone tell: its packed batches have a layout of their own, its groups may be."""
    names = ("dist.use_decentralized_pg", "dataset.enable_in_batch_packing", "dataset.enable_offline_packing")
    for room, name in (name.split(".") for name in names):
        if getattr(getattr(settings, room), name, False):
            error = refuse("Megatron-Bridge", given=f"{room}.{name}", allowed="it off", change="it to False")
            error.everywhere = True  # every rank has the same settings
            raise error


def _options(state: Any) -> SimpleNamespace:
    """What the checks read of Megatron-LM's namespace, from Bridge's settings."""
    settings = state.cfg
    return SimpleNamespace(
        load=settings.checkpoint.load,
        save=settings.checkpoint.save,
        iteration=state.train_state.step,
        micro_batch_size=settings.train.micro_batch_size,
        peft=settings.peft,
        reset_attention_mask=getattr(settings.dataset, "reset_attention_mask", False),
        use_megatron_fsdp=settings.dist.use_megatron_fsdp,
        use_torch_fsdp2=settings.dist.use_torch_fsdp2,
    )
