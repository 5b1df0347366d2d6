"""What every host does in the same way: begin with a loaded model, tell which steps counted, report what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from regate_megatron.api import attach, session_of
from regate_megatron.config import ReGateConfig
from regate_megatron.integrations.megatron_checkpoints import restore
from regate_megatron.step.attached_line import attached_line
from regate_megatron.step.counters import Counters, log_line, ratios, reduce_counters
from regate_megatron.step.outlook import first_look
from regate_megatron.step.session import Session
from regate_megatron.step.state import is_taken_from_student
from regate_megatron.support import HostRun, Setting, hints
from regate_megatron.teacher.source import TEACHER_FOLDER, hash_of_tokenizer, teacher_of_resumed_run
from regate_megatron.teacher.weights import save_language_model


def begin(model: list[Any], config: ReGateConfig, run: HostRun) -> Session | None:
    """Attach to a model whose weights are loaded, restore what a resumed run had learned, and say so.

    All ranks call this, in step, before the first step.

    Returns:
        the session; None where the settings say off.

    Raises:
        ReGateError: something is not supported, or saved state is damaged; on every rank.
    """
    attach(
        model,
        config,
        run=run,
        pad_token=_known_int(run.tokenizer, "pad") if run.pad_token is None else run.pad_token,
        vocab_size=_known_int(run.tokenizer, "vocab_size"),
        tokenizer_hash=hash_of_tokenizer(run.tokenizer, run.tokenizer_model) if config.reference_cache else None,
    )
    session = session_of(model)
    if session is None:
        return None
    session.counts_own_steps = False
    session.prepare(run.micro_batch_size)
    if line := restore(session, run):
        _say_once(line)
    _keep_teacher(session, run)
    _say_once(f"[regate] {attached_line(session)}")
    for line in hints(Setting(session.language_models, config, run)):
        _say_once(f"[regate] {line}")
    return session


def count(session: Session, *, counted: bool) -> None:
    """Learn from the step that ran if it ``counted``, else forget it. All ranks call this."""
    assert session.step is not None, "the training loop ran a schedule that was not wrapped"
    session.finish(counted)


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
    interval = interval or session.take_interval()
    total = reduce_counters(session.totals, session.topology)
    say(log_line(iteration, session.phase, interval, total, flops=flops))
    if line := first_look(session):
        say(line)
    if advice := session.advice(interval, total):
        say(advice)
    values = ratios(interval) | ({} if flops is None else {"regate/flops": flops})
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(values, iteration)


def _say_once(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _keep_teacher(session: Session, run: HostRun) -> None:
    """Save a teacher taken from the student beside the checkpoints, so that a resumed run has the same one."""
    if not is_taken_from_student(session) or run.save is None:
        return
    target, resumed = run.save / TEACHER_FOLDER, teacher_of_resumed_run(run)
    if resumed is None or resumed.resolve() != target.resolve():
        save_language_model(session.reference.require_teacher().chunks, target, session.topology)


def _known_int(tokenizer: Any, name: str) -> int | None:
    """An integer property of a tokenizer; None where it has none (tokenizers raise whatever they like)."""
    try:
        value = getattr(tokenizer, name)
    except Exception:
        return None
    return value if isinstance(value, int) else None
