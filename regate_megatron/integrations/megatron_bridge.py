"""Megatron-Bridge's training loop: one callback, and the names that the loop reads before any callback runs.

The callback does nearly all: ``on_train_start`` attaches (weights are loaded by then, no step has run; a pre-wrap hook
would come before the checkpoint and before LoRA), ``on_train_step_end`` says whether the step counted and logs,
``on_train_end`` detaches. Bridge has no hook around the schedule and none before a checkpoint is complete, so names are
patched: ``get_forward_backward_func`` where ``train`` looks it up (evaluation has its own copy and is not touched), and
the three of :mod:`.megatron_checkpoints`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron.bridge.training import checkpointing
from megatron.bridge.training import train as loop
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils.common_utils import print_rank_last

from regate_megatron.api import detach, session_of, wrap_forward_backward
from regate_megatron.batches import BatchAdapter, PaddedRows
from regate_megatron.config import ReGateConfig, require_settings
from regate_megatron.errors import one_line_refusals
from regate_megatron.integrations import host
from regate_megatron.integrations.megatron_checkpoints import CheckpointState
from regate_megatron.integrations.patching import patch, unpatch
from regate_megatron.support import HostRun, folder_or_none
from regate_megatron.support.bridge import check_settings

_PADS_ROWS = "megatron.bridge.models.qwen_vl.qwen3_vl_step"


def install(config: ReGateConfig, *, pad_token: int | None = None) -> Callback:
    """Patch the names; returns the callback for ``pretrain`` or ``finetune``. Any rank.

    With settings that say off nothing is patched, and the callback does nothing. ``pad_token`` is the tokenizer's pad
    id for ``teacher_visual="pad"``, where the tokenizer does not tell it.
    """
    require_settings(config, "install")
    uninstall()
    callback = _ReGateCallback(config, pad_token)
    if not config.enabled:
        return callback
    state = CheckpointState(callback.sessions, lambda given: _run_of(given["state"]))
    in_loop = {"get_forward_backward_func": _wrap_schedule_of}
    rooms = (loop, in_loop, loop.train), (checkpointing, state.wrappers, checkpointing.DefaultCheckpointManager.save)
    patch(*rooms, allowed="Megatron-Bridge 0.6")
    return callback


def uninstall() -> None:
    """Put the original functions back."""
    unpatch(loop, checkpointing)


def _wrap_schedule_of(inner: Callable[..., Any]) -> Callable[..., Any]:
    def schedule_of(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        run = wrap_forward_backward(inner(*args, **kwargs))

        @one_line_refusals()  # a refusal in a step would otherwise be a traceback of Bridge's on every rank
        def schedule(**arguments: Any) -> Any:
            session = session_of(arguments["model"])
            if session is not None:
                session.adapter = _as_the_step_lays_rows(session.adapter, arguments["forward_step_func"])
            return run(**arguments)

        return schedule

    return schedule_of


def _as_the_step_lays_rows(adapter: BatchAdapter, step: Any) -> BatchAdapter:
    """The adapter for a forward step of Bridge's that changes the rows it hands to the model."""
    if isinstance(adapter, PaddedRows) or getattr(step, "func", step).__module__ != _PADS_ROWS:
        return adapter
    settings = step.args[0].cfg  # Bridge binds its state to the step
    model = settings.model
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
    takes_whole = model.pipeline_model_parallel_size > 1 or model.expert_model_parallel_size > 1
    return PaddedRows(
        adapter=adapter,
        multiple=math.lcm(16, tensor * 2 * context if context > 1 else tensor),
        length=model.seq_length if takes_whole else None,
        end_to_end=bool(getattr(settings.dataset, "enable_in_batch_packing", False)),
    )


class _ReGateCallback(Callback):
    def __init__(self, config: ReGateConfig, pad_token: int | None) -> None:
        self.config, self.pad_token, self.sessions = config, pad_token, []

    @one_line_refusals()
    def on_train_start(self, context: CallbackContext) -> None:
        if not self.config.enabled:
            return
        check_settings(context.state.cfg)
        session = host.begin(context.model, self.config, _run_of(context.state, self.pad_token))
        self.sessions[:] = [session] if session else []

    def on_train_step_start(self, context: CallbackContext) -> None:
        for session in self.sessions:
            session.go_on_at(context.state.train_state.step)  # Bridge may have skipped some

    def on_train_step_end(self, context: CallbackContext) -> None:
        state = context.state
        iteration = state.train_state.step + 1
        for session in self.sessions:
            host.count(session, counted=not context.skipped_iter)
            if iteration % state.cfg.logger.log_interval == 0 and session.has_news:
                host.report(session, iteration, print_rank_last, state.tensorboard_logger, state.wandb_logger)

    def on_train_end(self, context: CallbackContext) -> None:
        self.sessions.clear()
        detach(context.model)
        uninstall()


def _run_of(state: Any, pad_token: int | None = None) -> HostRun:
    """What Bridge's settings tell of its run."""
    cfg = state.cfg
    saving, load = cfg.checkpoint, folder_or_none(cfg.checkpoint.load)
    if load is not None and load.name.startswith("iter_"):  # Bridge takes an iteration's folder as well
        load = load.parent
    fsdp = [name for name in ("use_megatron_fsdp", "use_torch_fsdp2") if getattr(cfg.dist, name)]
    return HostRun(
        iteration=state.train_state.step,
        micro_batch_size=cfg.train.micro_batch_size,
        load=load,
        save=folder_or_none(saving.save),
        async_save=bool(saving.async_save),
        keeps_non_persistent=saving.non_persistent_ckpt_type == "global",
        non_persistent_folder=folder_or_none(saving.non_persistent_global_ckpt_dir),
        tokenizer=state.tokenizer,
        tokenizer_model=cfg.tokenizer.tokenizer_model,
        pad_token=pad_token,
        has_adapters=cfg.peft is not None,
        fsdp=f"dist.{fsdp[0]}" if fsdp else None,
        document_masks="dataset.reset_attention_mask" if getattr(cfg.dataset, "reset_attention_mask", False) else None,
    )
