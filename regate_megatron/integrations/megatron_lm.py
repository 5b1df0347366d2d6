"""Megatron-LM's training loop: functions of ``megatron.training``, wrapped where the loop looks them up.

``pretrain`` offers no hook between loading a checkpoint and the first step, and none around a step, so symbols are
patched: the narrowest late-bound ones, in the module whose globals ``pretrain`` and ``train`` read. Nothing else is
touched; :func:`uninstall` restores them.

- ``setup_model_and_optimizer``: attach once weights are loaded.
- ``get_forward_backward_func``: the schedule of training (evaluation asks for it too, and passes through).
- ``train_step``: tells which steps counted (not skipped, not replayed).
- ``training_log``: one line and scalars per log interval.
- ``train`` and ``save_checkpoint_and_time``: what waits to be written goes to disk with a checkpoint and at the end.
- ``num_floating_point_operations``: counts what ran, see :mod:`.flops`.
- ``save_checkpoint`` and two of ``megatron.training.checkpointing``: see :mod:`.megatron_checkpoints`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regate_megatron import compat
from regate_megatron.api import attach, session_of, wrap_forward_backward
from regate_megatron.checkpoint import save_language_model
from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, add_arguments, parse_command_line
from regate_megatron.errors import ReGateError, one_line_refusals, one_line_refusals_from_now_on, refuse
from regate_megatron.integrations.flops import share_of_dense
from regate_megatron.integrations.megatron_checkpoints import CheckpointState, restore
from regate_megatron.metrics import Counters, log_line, ratios, reduce_counters
from regate_megatron.session import Session
from regate_megatron.support import check_support, setting_of_flags
from regate_megatron.teacher.source import TEACHER_FOLDER, hash_of_tokenizer, teacher_of_resumed_run

_MARK = "_regate"


def install(config: ReGateConfig) -> None:
    """Wrap the functions; a second call replaces the settings of the first (in-process restart)."""
    from megatron.training import checkpointing, training

    uninstall()
    session: list[Session] = []
    state = CheckpointState(session)
    in_training = {
        "setup_model_and_optimizer": lambda inner: _attach_after(inner, config, session),
        "get_forward_backward_func": lambda inner: _wrap_schedule_of(inner),
        "train_step": lambda inner: _count_steps(inner, session),
        "num_floating_point_operations": lambda inner: _count_real_work(inner, session),
        "training_log": lambda inner: _log_after(inner, session),
        "save_checkpoint_and_time": lambda inner: _flush_after(inner, session),
        "train": lambda inner: _flush_after(inner, session),
        "save_checkpoint": state.wrap_save,
    }
    in_checkpointing = {
        "get_checkpoint_tracker_filename": state.wrap_tracker,
        "schedule_async_save": state.wrap_schedule,
    }
    missing = [name for name in in_training if not callable(getattr(training, name, None))]
    missing += [name for name in in_checkpointing if not callable(getattr(checkpointing, name, None))]
    if missing:
        raise refuse(
            "megatron.training",
            given=f"{compat.versions()} without {', '.join(missing)}",
            allowed=f"megatron-core {compat.MEGATRON_CORE}",
            change="the version",
        )
    save_checkpoint = training.save_checkpoint
    _patch(training, in_training, training.train)
    _patch(checkpointing, in_checkpointing, save_checkpoint)


def _patch(module: Any, wrappers: dict[str, Callable[..., Any]], caller: Callable[..., Any]) -> None:
    for name, wrap in wrappers.items():
        inner = getattr(module, name)
        wrapper = functools.wraps(inner)(wrap(inner))
        setattr(wrapper, _MARK, True)
        setattr(module, name, wrapper)
        # The caller must read its globals from the module patched here, or the patch would be for nobody.
        assert inspect.unwrap(caller).__globals__[name] is wrapper, f"{name} is bound elsewhere"


def install_from_argv() -> None:
    """For scripts that carry the flags themselves (patches/): read ``sys.argv``, add the flags, install what they ask.

    Exits with 1 and one line on a refusal.
    """
    add_flags()
    with one_line_refusals():
        config = parse_command_line(sys.argv[1:])
        if config is not None:
            check_flags(sys.argv[1:], config)
    if config is not None:
        one_line_refusals_from_now_on()  # the rest of the script runs after this returns
        install(config)


def add_flags() -> None:
    """Teach Megatron's parser our flags: every parse of every version looks ``add_megatron_arguments`` up there."""
    from megatron.training import arguments

    inner = arguments.add_megatron_arguments
    if getattr(inner, _MARK, False):
        return

    @functools.wraps(inner)
    def add_megatron_arguments(parser: Any, *args: Any, **kwargs: Any) -> Any:
        return add_arguments(_with_printable_help(inner(parser, *args, **kwargs)))

    setattr(add_megatron_arguments, _MARK, True)
    arguments.add_megatron_arguments = add_megatron_arguments


def _with_printable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Help texts with a lone % (core 0.18.2, 0.19.0 and 0.20-dev have one) would end ``--help`` in a traceback."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def check_flags(flags: Sequence[str], config: ReGateConfig) -> None:
    """Refuse what Megatron's flags alone tell is not supported, before Megatron does anything.

    Raises:
        ReGateError: every rank has the same flags, so every rank raises.
    """
    from megatron.training import arguments

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    try:
        args, _ = arguments.add_megatron_arguments(parser).parse_known_args(list(flags))
    except (argparse.ArgumentError, SystemExit):
        return  # Megatron's own parser will say what is wrong
    supported, reason = check_support(setting_of_flags(args, config), flags_only=True)
    if not supported:
        raise ReGateError(reason, everywhere=True)


def uninstall() -> None:
    """Put the original functions back."""
    from megatron.training import checkpointing, training

    for module in (training, checkpointing):
        for name, value in list(vars(module).items()):
            if getattr(value, _MARK, False):
                setattr(module, name, value.__wrapped__)


def _attach_after(inner: Callable[..., Any], config: ReGateConfig, sessions: list[Session]) -> Callable[..., Any]:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, get_tokenizer, print_rank_0

        result = inner(*args, **kwargs)
        model, options, tokenizer = result[0], get_args(), get_tokenizer()
        attach(
            model,
            config,
            args=options,
            pad_token=_pad_token(tokenizer),
            vocab_size=_known_int(tokenizer, "vocab_size"),
            tokenizer_hash=hash_of_tokenizer(tokenizer, options) if config.reference_cache else None,
        )
        session = session_of(model)
        session.counts_own_steps = False
        session.prepare(options.micro_batch_size)
        if line := restore(session, options):
            print_rank_0(line)
        keep_teacher(session, options)
        sessions[:] = [session]
        print_rank_0(attached_line(session))
        return result

    return setup_model_and_optimizer


def _wrap_schedule_of(inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: wrap_forward_backward(inner(*args, **kwargs))


def _count_steps(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        session = sessions[0]
        session.step = getattr(get_args(), "curr_iteration", session.step)
        result = inner(*args, **kwargs)
        skipped, should_exit = result[1], result[3]
        assert session.has_step, "the training loop ran a schedule that was not wrapped"
        if skipped or should_exit:
            session.discard()
        else:
            session.commit()
        return result

    return train_step


def _count_real_work(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def num_floating_point_operations(args: Any, *rest: Any, **kwargs: Any) -> Any:
        flops = inner(args, *rest, **kwargs)
        return (
            flops * share_of_dense(inner, args, sessions[0].work_to_report, sessions[0].config) if sessions else flops
        )

    return num_floating_point_operations


def _log_after(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    signature = inspect.signature(inner)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training
        from megatron.training.utils import print_rank_last

        bound = signature.bind(*args, **kwargs).arguments
        iteration, session, interval = bound["iteration"], sessions[0], None
        ends_interval = iteration % get_args().log_interval == 0
        if session.interval.steps and (ends_interval or bound.get("is_first_iteration")):
            # Before Megatron's own line, which divides the interval's FLOPs by its time.
            interval = session.work_to_report = reduce_counters(session.interval, session.topology)
        result = inner(*args, **kwargs)
        if interval and ends_interval:
            formula = training.num_floating_point_operations.__wrapped__
            flops = share_of_dense(formula, get_args(), interval, session.config)
            writers = get_tensorboard_writer(), get_wandb_writer()
            report(session, iteration, print_rank_last, *writers, interval=interval, flops=flops)
        return result

    return training_log


def report(
    session: Session,
    iteration: int,
    say: Callable[[str], None],
    tensorboard: Any,
    wandb: Any,
    *,
    interval: Counters | None = None,
    flops: float | None = None,
) -> None:
    """Tell what ran since the last report: a line, and scalars where there is a writer. All ranks call this.

    Args:
        interval: the reduced counters, where the caller has them already.
        flops: the share of dense FLOPs that ran, where the framework counts them.
    """
    interval = interval or reduce_counters(session.interval, session.topology)
    total = reduce_counters(session.totals, session.topology)
    session.interval = Counters()
    say(log_line(iteration, session.phase, interval, total, flops=flops))
    values = ratios(interval) | ({} if flops is None else {"regate/flops": flops})
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(values, iteration)


def _flush_after(inner: Callable[..., Any], sessions: list[Session]) -> Callable[..., Any]:
    def flushed(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:  # the loop also leaves by sys.exit
            for session in sessions:
                session.flush()

    return flushed


def attached_line(session: Session) -> str:
    """What was attached, where, and to which versions."""
    config, transformer = session.config, session.language_models[0].config
    sizes = (transformer.tensor_model_parallel_size, transformer.pipeline_model_parallel_size, session.topology.dp_size)
    layout = " ".join(f"{name}{size}" for name, size in zip(("TP", "PP", "DP"), sizes, strict=True))
    for name, field in (("CP", "context"), ("EP", "expert_model"), ("VPP", "virtual_pipeline_model")):
        size = getattr(transformer, f"{field}_parallel_size", None) or 1
        layout += f" {name}{size}" if size > 1 else ""
    last = f" and the last {config.dense_last_layers}" if config.dense_last_layers else ""
    parts = [
        f"score {config.score}, keep {_ratio(config)} of the targets",
        f"dense layers {config.dense_layers}{last} of {transformer.num_layers}",
        f"budget {config.budget}",
        f"warm-up {config.warmup_steps}, then {config.dense_steps} of {config.cycle_steps} steps dense"
        + ("" if config.dense_from is None else f", all of them after iteration {config.dense_from}"),
        _teacher_of(session),
        compat.versions(),
    ]
    return f"[regate] attached to {type(session.models[0]).__name__} ({layout}): " + "; ".join(parts)


def _ratio(config: ReGateConfig) -> str:
    if config.keep_ratio_end is None:
        return f"{config.keep_ratio:g}"
    return f"{config.keep_ratio:g} to {config.keep_ratio_end:g} (over {config.keep_ratio_steps} iterations)"


def _teacher_of(session: Session) -> str:
    if session.reference is None:
        unused = " and ".join(session.config.unused)
        return f"no teacher ({unused}: not used)" if unused else "no teacher"
    waits = "" if session.reference.run is not None else ", built when a loss is missing"
    return f"teacher {session.config.teacher_load} ({session.config.teacher_visual}{waits})"


def keep_teacher(session: Session, options: Any) -> None:
    """Save a teacher taken from the student beside the checkpoints, so that a resumed run has the same one."""
    if session.config.teacher_load != STUDENT_AS_TEACHER or not session.config.needs_teacher or not options.save:
        return
    target, resumed = Path(options.save) / TEACHER_FOLDER, teacher_of_resumed_run(options)
    if resumed is None or resumed.resolve() != target.resolve():
        save_language_model(session.reference.require_teacher().chunks, target, session.topology.world_group)


def _pad_token(tokenizer: Any) -> int | None:
    return _known_int(tokenizer, "pad")


def _known_int(tokenizer: Any, name: str) -> int | None:
    """An integer property of a tokenizer; None where it has none (tokenizers raise whatever they like)."""
    try:
        value = getattr(tokenizer, name)
    except Exception:
        return None
    return value if isinstance(value, int) else None
