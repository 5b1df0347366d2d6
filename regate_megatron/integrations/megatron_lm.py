"""Megatron-LM's training loop: functions of ``megatron.training``, wrapped where the loop looks them up.

``pretrain`` offers no hook between loading a checkpoint and the first step, and none around a step, so symbols are
patched: the narrowest late-bound ones, in the module whose globals ``pretrain`` and ``train`` read. Nothing else is
touched; :func:`uninstall` restores them.

- ``setup_model_and_optimizer``: attach once weights are loaded.
- ``get_forward_backward_func``: the schedule of training (evaluation asks for it too, and passes through).
- ``train_step``: tells which steps counted (not skipped, not replayed).
- ``training_log``: one line and scalars per log interval.
- ``train``: what waits to be written goes to disk at the end, which may be ``sys.exit``.
- ``num_floating_point_operations``: counts what ran, see :mod:`.flops`.
- ``save_checkpoint`` and two of ``megatron.training.checkpointing``: see :mod:`.megatron_checkpoints`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from regate_megatron import compat
from regate_megatron.api import wrap_forward_backward
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import one_line_refusals, one_line_refusals_from_now_on
from regate_megatron.integrations import host
from regate_megatron.integrations.flags import add_flags, read_flags, run_of
from regate_megatron.integrations.flops import share_of_dense
from regate_megatron.integrations.megatron_checkpoints import CheckpointState
from regate_megatron.integrations.patching import patch, unpatch
from regate_megatron.step.session import Session


def install(config: ReGateConfig) -> None:
    """Wrap the functions; a second call replaces the settings of the first (in-process restart).

    With settings that say off, nothing is wrapped.
    """
    from megatron.training import checkpointing, get_args, training

    uninstall()
    if not config.enabled:
        return
    sessions: list[Session] = []
    saves = CheckpointState(sessions, lambda given: run_of(get_args(), iteration=given["iteration"]))
    in_checkpointing = saves.wrappers
    in_training = {
        "setup_model_and_optimizer": lambda inner: _attach_after(inner, config, sessions),
        "get_forward_backward_func": _wrap_schedule_of,
        "train_step": lambda inner: _count_steps(inner, sessions),
        "num_floating_point_operations": lambda inner: _count_real_work(inner, sessions),
        "training_log": lambda inner: _log_after(inner, sessions),
        "train": lambda inner: _flush_after(inner, sessions),
        "save_checkpoint": in_checkpointing.pop("save_checkpoint"),
    }
    rooms = (training, in_training, training.train), (checkpointing, in_checkpointing, training.save_checkpoint)
    patch(*rooms, allowed=f"megatron-core {compat.MEGATRON_CORE}")


def uninstall() -> None:
    """Put the original functions back."""
    from megatron.training import checkpointing, training

    unpatch(training, checkpointing)


def install_from_argv() -> None:
    """For scripts that carry the flags themselves (patches/): read ``sys.argv``, add the flags, install what they ask.

    Exits with 1 and one line on a refusal.
    """
    with one_line_refusals():
        compat.require_megatron()
        add_flags()
        config = read_flags(sys.argv[1:], sys.argv[0])
    if config is not None:
        one_line_refusals_from_now_on()  # the rest of the script runs after this returns
        install(config)


def _attach_after(inner: Callable[..., Any], config: ReGateConfig, sessions: list[Session]) -> Callable[..., Any]:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, get_tokenizer

        result = inner(*args, **kwargs)
        session = host.begin(result[0], config, run_of(get_args(), tokenizer=get_tokenizer()))
        sessions[:] = [session]
        return result

    return setup_model_and_optimizer


def _wrap_schedule_of(inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: wrap_forward_backward(inner(*args, **kwargs))


def _count_steps(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        session = sessions[0]
        session.go_on_at(getattr(get_args(), "curr_iteration", session.steps_done))
        result = inner(*args, **kwargs)
        skipped, should_exit = result[1], result[3]
        host.count(session, counted=not (skipped or should_exit))
        return result

    return train_step


def _count_real_work(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def num_floating_point_operations(args: Any, *rest: Any, **kwargs: Any) -> Any:
        dense = inner(args, *rest, **kwargs)
        if not sessions:
            return dense
        return dense * share_of_dense(inner, args, sessions[0].work, sessions[0].config)

    return num_floating_point_operations


def _log_after(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    signature = inspect.signature(inner)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training
        from megatron.training.utils import print_rank_last

        bound = signature.bind(*args, **kwargs).arguments
        iteration, session, interval = bound["iteration"], sessions[0], None
        ends_interval = iteration % get_args().log_interval == 0
        if session.has_news and ends_interval:
            interval = session.take_interval()  # before Megatron's own line, which divides its FLOPs by its time
        result = inner(*args, **kwargs)
        if interval:
            formula = training.num_floating_point_operations.__wrapped__
            flops = share_of_dense(formula, get_args(), interval, session.config)
            writers = get_tensorboard_writer(), get_wandb_writer()
            host.report(session, iteration, print_rank_last, *writers, interval=interval, flops=flops)
        return result

    return training_log


def _flush_after(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def train(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:  # the loop also leaves by sys.exit
            for session in sessions:
                session.flush()

    return train
