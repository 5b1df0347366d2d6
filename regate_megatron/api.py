"""The public verbs: attach ReGATE to model chunks, detach, describe, wrap a forward-backward function; and for loops of
one's own, count steps, save what was learned and load it again.

The integrations of hosts do the latter three by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regate_megatron import compat
from regate_megatron.batches import adapter_for
from regate_megatron.config import ReGateConfig, require_settings
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.ranks.topology import Topology, build_topology
from regate_megatron.step.session import Session
from regate_megatron.step.state import load_state as load_session
from regate_megatron.step.state import save_state as save_session
from regate_megatron.step.trace import check_trace_folder
from regate_megatron.support import HostRun, Setting, check_support
from regate_megatron.teacher import TeacherSource
from regate_megatron.teacher.given import check_given
from regate_megatron.teacher.source import check_pad_token, find_teacher, takes_base

_SESSION = "_regate_session"


def attach(
    model_chunks: list[Any],
    config: ReGateConfig,
    teacher: Any = None,
    *,
    run: HostRun | None = None,
    pad_token: int | None = None,
    vocab_size: int | None = None,
    tokenizer_hash: str | None = None,
) -> list[Any]:
    """Attach ReGATE to this rank's model chunks; returns them, so that it serves as a pre-wrap hook.

    All ranks call this once, in step, after Megatron's parallel state is set up. Parameters, names and state dicts stay
    as they are. Steps change only inside a function wrapped by :func:`wrap_forward_backward`. What needs loaded weights
    (a teacher taken from the student) waits for the first step.

    Args:
        model_chunks: the chunks the framework trains, wrapped or not.
        config: the settings.
        teacher: a frozen language model sharded like the student, with or without sequence parallelism (its chunk, or
            the list of its chunks), in place of ``config.teacher_load``; not looked at where no score asks for one.
        run: what the host tells of its run, where one does, for checks and defaults.
        pad_token: the tokenizer's pad id, for ``teacher_visual="pad"`` and batches without a loss mask.
        vocab_size: the student tokenizer's true size, to check the teacher's against.
        tokenizer_hash: a hash of the student's tokenizer, to tell whose reference losses a cache holds.

    Raises:
        ReGateError: something asked for is not supported; on every rank, before anything is changed.
    """
    require_settings(config, "attach")
    if not config.enabled:
        return model_chunks
    if isinstance(model_chunks, torch.nn.Module) and not isinstance(model_chunks, torch.nn.ModuleList):
        given = f"a {type(model_chunks).__name__} by itself"
        raise refuse("attach", given=given, allowed="a list of model chunks", change="it to [model]")
    chunks = list(model_chunks)
    if not chunks:
        raise refuse("attach", given="no chunk", allowed="a list of model chunks", change="it to [model]")
    if any(hasattr(compat.unwrap(chunk), _SESSION) for chunk in chunks):
        raise refuse("attach", given="a model that has ReGATE already", allowed="one attach", change="it: detach first")
    run = run or HostRun()
    topology = build_topology()
    session = None
    try:
        with topology.together("attach"):
            session = _checked_session(chunks, config, topology, run, pad_token, vocab_size, tokenizer_hash, teacher)
            session.hooks.attach()
    except BaseException:
        if session is not None:
            session.hooks.detach()
        topology.close()
        raise
    for model in session.models:
        object.__setattr__(model, _SESSION, session)
    return model_chunks


def _checked_session(
    chunks: list[Any],
    config: ReGateConfig,
    topology: Topology,
    run: HostRun,
    pad_token: int | None,
    vocab_size: int | None,
    tokenizer_hash: str | None,
    teacher: Any,
) -> Session:
    """The session, once nothing that can be known now is against it.

    Raises:
        ReGateError: something is not supported.
    """
    models = [compat.unwrap(chunk) for chunk in chunks]
    language_models = [compat.language_model_of(model) for model in models]
    switches = torch.tensor([any(compat.adapters_of(model) for model in language_models)], dtype=torch.int64)
    run = dataclasses.replace(run, switches_adapters=bool(topology.all_reduce_replica(switches, "max")))
    adapter = adapter_for(models[0], pad_token, run.flags, config.sample_key)
    setting = Setting(language_models, config, run, is_multimodal=language_models[0] is not models[0])
    supported, reason = check_support(setting)
    if not supported:
        raise ReGateError(reason)
    source = checkpoint = None
    if config.needs_teacher:
        if teacher is None:
            config.require_teacher()
            checkpoint = find_teacher(language_models, config, run, pad_token=pad_token, vocab_size=vocab_size)
        else:
            check_pad_token(config, pad_token)
            check_given(teacher, language_models, vocab_size)
        is_base = teacher is None and takes_base(config, run)
        source = TeacherSource(teacher, checkpoint, pad_token, tokenizer_hash, is_base)
    if config.trace:
        check_trace_folder(config.trace)
    return Session(chunks, config, topology, run, adapter, source)


def session_of(model_chunks: Any) -> Session | None:
    """The session attached to these chunks, or None."""
    chunk = model_chunks[0] if isinstance(model_chunks, list) else model_chunks
    return compat.unwrap(chunk).__dict__.get(_SESSION)


def detach(model_chunks: list[Any]) -> list[Any]:
    """Undo :func:`attach`: modules, attributes, hooks and process groups are as before. Any rank, no communication."""
    session = session_of(model_chunks)
    if session is not None:
        session.detach()
        session.topology.close()
        for model in session.models:
            object.__delattr__(model, _SESSION)
    return model_chunks


def describe(model_chunks: list[Any]) -> str:
    """What is attached where, in lines for a person."""
    session = session_of(model_chunks)
    return session.describe() if session else "regate is not attached"


def wrap_forward_backward(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward-backward function of Megatron-Core's schedules.

    Training calls on attached models become ReGATE steps; evaluation and other models pass through untouched. A step is
    counted when the next one begins, or by :func:`step_done` before that.
    """

    def forward_backward(**arguments: Any) -> Any:
        session = session_of(arguments["model"])
        if session is None or arguments.get("forward_only"):
            return schedule(**arguments)
        if session.counts_own_steps:
            session.finish()
        return session.run(schedule, arguments)

    forward_backward.__wrapped__ = schedule
    return forward_backward


def step_done(model_chunks: list[Any], counted: bool = True) -> None:
    """Say what became of the step that just ran: learn from it, or forget it.

    All ranks call this, after the optimizer; planners exchange losses over their group. A loop that never skips or
    replays a step can leave it out: the next step then counts the one before.

    Args:
        counted: False where the optimizer did not step (gradients not finite, a replay): nothing is learned.
    """
    session = session_of(model_chunks)
    if session is not None:
        session.finish(counted)


def save_state(model_chunks: list[Any], folder: str | Path) -> None:
    """Save what was learned (difficulty, prior, schedule position, totals) into ``folder``, all or nothing.

    A teacher taken from the student is saved with it: its weights. All ranks call this between two steps, in step; a
    step not counted yet is counted. ``folder`` is on a file system that all ranks see; every planner writes its own
    part, and the folder appears when all parts are on the disk.

    Raises:
        ReGateError: ReGATE is not attached, or a part could not be written; on every rank.
    """
    session = _session_for(model_chunks, "save_state")
    session.finish()
    save_session(session, Path(folder))


def load_state(model_chunks: list[Any], folder: str | Path) -> str:
    """Continue from what :func:`save_state` left in ``folder``; another data-parallel size is fine.

    All ranks call this after :func:`attach`, before the first step, in step. The teacher is the one there was: one
    taken from the student is loaded from ``folder``.

    Returns:
        one line for the log: how much came back, which settings differ, and whether the teacher is another one.

    Raises:
        ReGateError: ReGATE is not attached, or the folder is missing, incomplete or damaged, or a teacher taken from
            the student is another one than it was; on every rank, and nothing learned has changed.
    """
    return load_session(_session_for(model_chunks, "load_state"), Path(folder))


def _session_for(model_chunks: list[Any], verb: str) -> Session:
    session = session_of(model_chunks)
    if session is None:
        raise refuse(
            verb, given="a model without ReGATE", allowed="model chunks that attach returned", change="it: attach first"
        )
    return session
