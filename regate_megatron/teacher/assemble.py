"""Put together what gives reference losses: the teacher (now or later), the store, and whose losses they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from regate_megatron.config import ReGateConfig, flag
from regate_megatron.decoder import Hooks
from regate_megatron.memory.references import ReferenceCache
from regate_megatron.ranks.topology import Topology
from regate_megatron.teacher.base import BaseRun
from regate_megatron.teacher.build import build_teacher
from regate_megatron.teacher.fingerprint import fingerprint_of_checkpoint, fingerprint_of_model
from regate_megatron.teacher.losses import ReferenceLosses
from regate_megatron.teacher.manifest import claim, teacher_identity
from regate_megatron.teacher.run import TeacherRun
from regate_megatron.teacher.settings import settings_of, settle
from regate_megatron.teacher.weights import LanguageModelCheckpoint


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher comes from.

    Attributes:
        model: this rank's chunk of a teacher made by the caller, or the list of its chunks; or None.
        checkpoint: its weights; None with no ``model``: the student's own, as they are now.
        pad_token: the tokenizer's pad id.
        tokenizer: a hash of the tokenizer, None where none could be made.
        is_base: whether it is the student's frozen base, adapters off (:mod:`.base`).
    """

    model: Any = None
    checkpoint: LanguageModelCheckpoint | None = None
    pad_token: int | None = None
    tokenizer: str | None = None
    is_base: bool = False


def open_reference(
    source: TeacherSource, students: Sequence[Any], config: ReGateConfig, topology: Topology, hooks: Hooks
) -> ReferenceLosses:
    """Open the store and, unless a cache may make it needless, build the teacher; all ranks call this.

    The teacher waits for the first miss only when a cache directory is given, holds records already, and the weights
    are in a checkpoint: the student's own are about to change.

    Args:
        students: this rank's language-model chunks, their weights loaded.
        hooks: what is attached to them.

    Raises:
        ReGateError: the teacher cannot be read, or the cache is another teacher's; on every rank.
    """

    student = students[0]

    def build() -> list[Any]:
        if source.model is not None:
            return source.model if isinstance(source.model, list) else [source.model]
        if source.is_base:
            return list(students)
        return [build_teacher(one, source.checkpoint) for one in students]

    teacher, store, directory = None, None, None
    if config.reference_cache is None or source.checkpoint is None:
        teacher = build()
    identity = _identity(source, student, teacher, config, topology)
    if config.reference_cache is not None:
        directory = Path(config.reference_cache)
        store = _open_cache(directory, identity, topology)
        with topology.together("reference cache") as stage:
            stage.wish = teacher is None and topology.is_planner and topology.dp_rank == 0 and not len(store)
        if stage.anyone_wishes:
            teacher = build()  # a new cache: it will be needed, so let it fail now if it must
    cut = student if source.model is None else teacher[0]  # a caller's may have sequence parallelism by itself
    return ReferenceLosses(
        cut.config,
        teacher,
        topology,
        visual=config.teacher_visual,
        pad_token=source.pad_token,
        build=build,
        store=store,
        offload=config.teacher_offload and not source.is_base,
        identity=identity,
        proof=directory,
        run_of=(lambda chunks: BaseRun(chunks, hooks)) if source.is_base else TeacherRun,
    )


def _identity(
    source: TeacherSource, student: Any, teacher: Sequence[Any] | None, config: ReGateConfig, topology: Topology
) -> dict[str, Any]:
    """Who the teacher is; says on rank 0 what it has otherwise than the student. All ranks call this."""
    settings = settle(student, source.checkpoint)
    like, vocab_size = student, student.vocab_size
    if source.model is not None:
        like, vocab_size = teacher[0], teacher[0].vocab_size
        settings = settle(like, None)
    elif source.checkpoint is not None:
        vocab_size = source.checkpoint.vocab_size
    if dist.get_rank() == 0:
        for line in settings.lines():
            print(f"[regate] teacher: {line}", flush=True)
    if teacher is not None:
        weights = fingerprint_of_model(teacher, topology)
    else:
        weights = fingerprint_of_checkpoint(source.checkpoint, Path(config.reference_cache), topology)
    return teacher_identity(
        settings_of(settings.config, like, settings.rotary),
        weights=weights,
        vocab_size=vocab_size,
        tokenizer=source.tokenizer,
        visual=config.teacher_visual,
        pad_token=source.pad_token,
        dtype=next(like.parameters()).dtype,
    )


def _open_cache(directory: Path, identity: dict[str, Any], topology: Topology) -> ReferenceCache | None:
    """The cache on planners, None elsewhere, once rank 0 has made sure whose it is. All ranks call this."""
    form = {"allowed": "a folder that all planners can read and write", "change": "the folder or its permissions"}
    with topology.together(flag("reference_cache"), **form):
        if dist.get_rank() == 0:
            claim(directory, identity)
    with topology.together(flag("reference_cache"), **form):
        return ReferenceCache(directory, f"dp{topology.dp_rank:05d}") if topology.is_planner else None
