"""ms-swift's Megatron trainer: a callback by name, over models of mcore-bridge.

    # plugin.py, for --external_plugins plugin.py --callbacks regate
    from regate_megatron import ReGateConfig
    from regate_megatron.integrations import ms_swift

    ms_swift.install(ReGateConfig(keep_ratio=0.5, teacher_load="student"))

``on_train_begin`` attaches (weights are loaded by then), ``on_save`` writes what was learned beside the checkpoint,
``on_train_end`` detaches. The trainer has no hook around its schedule and does not tell callbacks whether the optimizer
stepped: ``get_forward_backward_func`` is patched where the trainer looks it up, and its ``train_step`` on the trainer,
both for the time of a training. Without ``install`` nothing is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map
from swift.megatron.trainers import base

from regate_megatron.api import detach, load_state, save_state, wrap_forward_backward
from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, require_settings
from regate_megatron.errors import one_line_refusals, refuse
from regate_megatron.integrations import host
from regate_megatron.integrations.patching import patch, unpatch
from regate_megatron.support import HostRun

NAME, STATE = "regate", "regate"
TUNERS = ("full", "lora")


def install(config: ReGateConfig, *, pad_token: int | None = None) -> None:
    """Register the callback ``regate``; with settings that say off it does nothing. Any rank."""
    require_settings(config, "install")

    def make(trainer: Any) -> MegatronCallback:
        return _ReGateCallback(trainer, config, pad_token)

    megatron_callbacks_map[NAME] = make


class _ReGateCallback(MegatronCallback):
    def __init__(self, trainer: Any, config: ReGateConfig, pad_token: int | None) -> None:
        super().__init__(trainer)
        self.config, self.pad_token, self.session = config, pad_token, None

    @one_line_refusals()
    def on_train_begin(self) -> None:
        if not self.config.enabled:
            return
        trainer = self.trainer
        _check(trainer.args, self.config)
        self.session = host.begin(trainer.wrapped_models, self.config, _run_of(trainer, self.pad_token))
        if self.session is None:
            return
        if trainer.state.iteration and (saved := _state_of(trainer.args)) is not None:
            print(f"[regate] {load_state(trainer.wrapped_models, saved)}", flush=True)
        schedule = {"get_forward_backward_func": _wrap_schedule_of}
        patch((base, schedule, base.BaseMegatronTrainer.train_step), allowed="ms-swift 4.6")
        trainer.train_step = self._train_step

    def _train_step(self, iterator: Any) -> Any:
        """The trainer's own, and whether its optimizer stepped."""
        self.session.go_on_at(self.trainer.state.iteration)
        found = type(self.trainer).train_step(self.trainer, iterator)
        host.count(self.session, counted=bool(found[2]))
        return found

    def on_step_end(self) -> None:
        iteration = self.trainer.state.iteration
        if self.session is not None and iteration % self.trainer.args.logging_steps == 0 and self.session.has_news:
            host.report(self.session, iteration, print, None, None)

    def on_save(self, output_dir: str) -> None:
        if self.session is not None:
            save_state(self.trainer.wrapped_models, Path(output_dir) / STATE)

    def on_train_end(self) -> None:
        if self.session is None:
            return
        unpatch(base)
        del self.trainer.train_step
        detach(self.trainer.wrapped_models)
        self.session = None


def _wrap_schedule_of(inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: one_line_refusals()(wrap_forward_backward(inner(*args, **kwargs)))


def _check(args: Any, config: ReGateConfig) -> None:
    """Refuse what this trainer has and nobody has run; every rank has the same arguments, so every rank raises."""
    is_teacher = config.needs_teacher and config.teacher_load == STUDENT_AS_TEACHER
    merges = args.tuner_type != "full" and args.save_safetensors and args.merge_lora
    zigzag = args.context_parallel_size == 1 or args.cp_partition_mode == "zigzag"
    for is_wrong, name, allowed, value in (
        (args.task_type != "causal_lm", "task_type", "causal_lm", "causal_lm"),
        (args.tuner_type not in TUNERS, "tuner_type", " or ".join(TUNERS), TUNERS[0]),
        (not zigzag, "cp_partition_mode", "zigzag, the cut that is adapted", "zigzag"),
        (
            is_teacher and merges,
            "merge_lora",
            "false where the base is the teacher: every save would add the adapters to it and take them off, rounded",
            "false (megatron export merges afterwards)",
        ),
    ):
        if is_wrong:
            given = f"--{name} {getattr(args, name)}"
            error = refuse("ms-swift", given=given, allowed=allowed, change=f"--{name} to {value}")
            error.everywhere = True
            raise error


def _state_of(args: Any) -> Path | None:
    """What was learned, beside the checkpoint that the run continues from."""
    of_adapters = (args.mcore_adapter, *args.adapters)
    starts = (args.mcore_model, args.model) if args.tuner_type == "full" else of_adapters
    start = next(filter(None, starts), None)
    return folder if start and (folder := Path(start) / STATE).is_dir() else None


def _run_of(trainer: Any, pad_token: int | None) -> HostRun:
    """What the trainer tells of its run; its checkpoints are saved by ``on_save``."""
    args = trainer.args
    return HostRun(
        iteration=trainer.state.iteration,
        micro_batch_size=1 if args.padding_free else args.micro_batch_size,
        tokenizer_model=args.model,
        pad_token=pad_token,
        has_adapters=args.tuner_type != "full",
    )
