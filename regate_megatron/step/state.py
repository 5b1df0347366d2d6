"""A session's saved state: what it gives to :mod:`regate_megatron.memory.state` and takes back, with its teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig
from regate_megatron.memory.state import Progress, SavedState, StateSave, has_state, read_state
from regate_megatron.ranks.publishing import filled_by_all_ranks
from regate_megatron.step.counters import Counters, reduce_counters
from regate_megatron.teacher.manifest import differences
from regate_megatron.teacher.source import teacher_is_gone
from regate_megatron.teacher.weights import open_language_model, save_language_model

if TYPE_CHECKING:
    from regate_megatron.step.session import Session

TEACHER = "teacher"  # in a folder of save_state: the weights of a teacher taken from the student
# They say where things are or what this run is to do, not what was learned.
_NO_SETTINGS = {
    "enabled",
    "reset_difficulty",
    "difficulty_memory",
    "trace",
    "reference_cache",
    "teacher_load",
    "teacher_offload",
}
_NOT_THE_TEACHER = ("tokenizer ", "visual ")  # of its identity: how it is read, which a run may change


def begin_save(session: Session, aside: Path, steps_done: int) -> StateSave:
    """A save of what the session knows now, into ``aside``; no step of it is pending. All ranks call this, in step.

    Raises:
        ReGateError: the folder cannot be made; on every rank.
    """
    progress = Progress(
        step=steps_done,
        dense_until=session.dense_until,
        learns=session.config.learns_losses,
        settings=_settings(session.config),
        totals=dataclasses.asdict(reduce_counters(session.totals, session.topology)),
        teacher=session.reference.identity if session.reference else None,
    )
    return StateSave(session.learned, progress, session.topology, aside)


def save_state(session: Session, folder: Path) -> None:
    """Save into ``folder``, all of it or nothing, with a teacher taken from the student. All ranks call this, in step.

    Raises:
        ReGateError: it could not be written; on every rank.
    """
    session.open_teacher()
    with filled_by_all_ranks(folder, "saving difficulty", session.topology) as aside:
        save = begin_save(session, aside, session.steps_done)
        save.write()
        if is_taken_from_student(session):  # nobody else has it once the student has learned
            save_language_model(session.reference.require_teacher().chunks, aside / TEACHER, session.topology)
        save.finish()


def load_state(session: Session, folder: Path) -> str:
    """Continue from what :func:`save_state` left in ``folder``; returns a line that says what came back.

    All ranks call this, in step, before the first step; planners read. The teacher is opened here: it must be the one
    there was.

    Raises:
        ReGateError: there is nothing, or it is damaged, or a teacher taken from the student is not the one there was;
            on every rank, and nothing learned has changed.
    """
    saved = read_state(folder, session.topology, session.learned)
    progress = saved.progress
    said = _continue_teaching(session, folder, progress.teacher)
    if session.learned is not None:
        session.learned.adopt(saved.records, saved.prior)
    names = {field.name for field in dataclasses.fields(Counters)}
    totals = Counters(**{name: count for name, count in progress.totals.items() if name in names})
    totals = totals if session.topology.dp_rank == 0 else Counters()  # they are summed over replicas
    session.restore(progress.step, progress.dense_until, totals)
    if lacks_what_it_scores_by(progress, session.config):
        session.resume(progress.step)
    return _summary(saved, session.config) + said


def lacks_what_it_scores_by(before: Progress, config: ReGateConfig) -> bool:
    """Whether scores use losses, of the sort that they use now, or gradients that the run ``before`` did not learn."""
    difficulty, visual_score = (before.settings.get(name) for name in ("difficulty", "visual_score"))
    has_losses = before.learns and (difficulty or "own") == config.difficulty
    return config.learns_losses and not has_losses or config.learns_gradients and visual_score != config.visual_score


def is_taken_from_student(session: Session) -> bool:
    """Whether the teacher is the student as it was at the first start."""
    source = session.teacher_source
    is_taken = source is not None and source.model is None and not source.is_base
    return is_taken and session.config.teacher_load == STUDENT_AS_TEACHER


def _continue_teaching(session: Session, folder: Path, before: dict[str, Any] | None) -> str:
    """Have the teacher that there was; returns what to say of one that the user has changed. All ranks call this.

    Raises:
        ReGateError: the teacher is the student, and another one than it was; on every rank.
    """
    source, from_student = session.teacher_source, is_taken_from_student(session)
    if before is None or source is None:
        return ""
    if from_student and source.checkpoint is None and has_state(folder / TEACHER, session.topology):
        with session.topology.together("saved teacher", allowed="the complete folder as it was saved"):
            kept = open_language_model(folder / TEACHER, "saved teacher")
        session.teach_with(dataclasses.replace(source, checkpoint=kept))
    found = differences(before, session.open_teacher().identity)
    if from_student and any(not name.startswith(_NOT_THE_TEACHER) for name in found):
        error = teacher_is_gone(f"a run that goes on with another teacher than it had ({'; '.join(found)})")
        error.everywhere = True  # every rank compares the same two
        raise error
    return f"; the teacher is another one than before: {'; '.join(found)}" if found else ""


def _settings(config: ReGateConfig) -> dict[str, Any]:
    """The settings as JSON keeps them; a fingerprint to compare a resumed run with."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_SETTINGS}


def _summary(saved: SavedState, config: ReGateConfig) -> str:
    before, now = saved.progress.settings, _settings(config)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    line = f"difficulty of {saved.num_targets:,} targets in {saved.num_samples:,} samples restored"
    if not config.learns and not saved.num_samples:
        line = "schedule and totals restored (the score keeps nothing of samples)"
    if config.learns_gradients:  # kept beside it
        line = f"{saved.num_targets:,} averages of losses and gradients in {saved.num_samples:,} records restored"
    return line + (f"; settings changed: {', '.join(changed)}" if changed else "")
