"""The public verbs: attach ReGATE to model chunks, detach, describe, and wrap a forward-backward function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regate_megatron import compat
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.metrics import check_trace_folder
from regate_megatron.session import Session
from regate_megatron.teacher.source import find_teacher
from regate_megatron.topology import agree_on_error, build_topology

_SESSION = "_regate_session"


def attach(
    model_chunks: list[Any],
    config: ReGateConfig,
    teacher: Any = None,
    *,
    args: Any = None,
    pad_token: int | None = None,
    vocab_size: int | None = None,
) -> list[Any]:
    """Attach ReGATE to this rank's model chunks; returns them, so that it serves as a pre-wrap hook.

    All ranks call this once, in step, after Megatron's parallel state is set up. Parameters, names and state dicts stay
    as they are. Steps change only inside a function wrapped by :func:`wrap_forward_backward`. What needs loaded weights
    (a teacher taken from the student) waits for the first step.

    Args:
        model_chunks: the chunks the framework trains, wrapped or not.
        config: the settings.
        teacher: a frozen language model sharded like the student (its chunk, or the list of its chunks), in place of
            ``config.teacher_load``.
        args: the framework's namespace, for checks and defaults.
        pad_token: the tokenizer's pad id, for ``teacher_visual="pad"``.
        vocab_size: the student tokenizer's true size, to check the teacher's against.

    Raises:
        ReGateError: something asked for is not supported; on every rank, before anything is changed.
    """
    if not config.enabled:
        return model_chunks
    chunks = list(model_chunks)
    if any(hasattr(compat.unwrap(chunk), _SESSION) for chunk in chunks):
        raise refuse("attach", given="a model that has ReGATE already", allowed="one attach", change="detach first")
    topology = build_topology()
    language_models = [compat.language_model_of(compat.unwrap(chunk)) for chunk in chunks]
    is_multimodal = language_models[0] is not compat.unwrap(chunks[0])
    checkpoint, error = None, None
    try:
        setting = compat.Setting(language_models, config, args, is_multimodal=is_multimodal)
        supported, reason = compat.check_support(setting)
        if not supported:
            raise ReGateError(reason)
        if teacher is None and config.needs_teacher:
            config.require_teacher()
            checkpoint = find_teacher(language_models, config, args, pad_token=pad_token, vocab_size=vocab_size)
        if config.trace:
            check_trace_folder(config.trace)
    except Exception as fault:  # whatever it is, the other ranks wait to hear of it
        error = str(fault) if isinstance(fault, ReGateError) else f"regate: attach: {fault!r}"
    agree_on_error(error, topology)
    session = Session(chunks, config, topology, args)
    if config.needs_teacher:
        session.teach_with(teacher, checkpoint, pad_token)
    session.attach_hooks()
    for model in session.models:
        object.__setattr__(model, _SESSION, session)
    return model_chunks


def session_of(model_chunks: Any) -> Session | None:
    """The session attached to these chunks, or None."""
    chunk = model_chunks[0] if isinstance(model_chunks, list) else model_chunks
    return compat.unwrap(chunk).__dict__.get(_SESSION)


def detach(model_chunks: list[Any]) -> list[Any]:
    """Undo :func:`attach`: modules, attributes and hooks are as before. Any rank, no communication."""
    session = session_of(model_chunks)
    if session is not None:
        session.detach_hooks()
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
    counted when the next one begins, unless the framework's integration says so earlier (see :meth:`Session.commit`).
    """

    def forward_backward(**arguments: Any) -> Any:
        session = session_of(arguments["model"])
        if session is None or arguments.get("forward_only"):
            return schedule(**arguments)
        if session.counts_own_steps:
            session.commit()
        return session.run(schedule, arguments)

    forward_backward.__wrapped__ = schedule
    return forward_backward
