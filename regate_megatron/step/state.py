"""What a run has learned, saved into a folder and loaded from it: at another data-parallel size too.

Every planner writes its own records, beside each other; nobody holds more than its share. On loading, a planner reads
the files that can hold keys it owns and keeps those. Difficulty, prior, schedule position and totals come back bit for
bit.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from regate_megatron.config import STUDENT_AS_TEACHER
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.memory.difficulty import TokenPrior
from regate_megatron.memory.records import Records
from regate_megatron.memory.state_files import (
    MANIFEST,
    PRIOR,
    STATE_FOLDER,
    FileFacts,
    read_array,
    read_manifest,
    read_records,
    records_name,
    write_array,
    write_manifest,
    write_records,
)
from regate_megatron.ranks.publishing import filled_by_all_ranks, replace_folder
from regate_megatron.ranks.topology import Topology, agree_on_error
from regate_megatron.step.counters import Counters, reduce_counters
from regate_megatron.teacher.manifest import differences
from regate_megatron.teacher.source import teacher_is_gone
from regate_megatron.teacher.weights import open_language_model, save_language_model

if TYPE_CHECKING:
    from regate_megatron.step.session import Session

TEACHER = "teacher"  # in a folder of save_state: the weights of a teacher taken from the student
_FLOAT64 = np.dtype("<f8")
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


class StateSave:
    """One save in flight: made, written, finished, and published by a rename. All ranks make and finish it, in step.

    What is saved is the state at the time of making; :meth:`write` may run in a thread while training goes on. Until
    :meth:`finish`, blocks of records that training changes exist twice.

    Args:
        session: the session; no step of it is pending.
        aside: a folder for this save alone, beside the checkpoint; emptied here.
        step: steps done.
    """

    def __init__(self, session: Session, aside: Path, step: int) -> None:
        self.topology, self.aside = session.topology, aside
        self._error: str | None = None
        self._thread: threading.Thread | None = None
        self._records, self._facts, self._prior_facts = None, FileFacts(0, "0" * 32), FileFacts(0, "0" * 32)
        totals = reduce_counters(session.totals, session.topology)
        self._content = {
            "step": step,
            "dense_until": session.dense_until,
            "learns": session.config.learns,
            "settings": _settings(session.config),
            "totals": dataclasses.asdict(totals),
            "teacher": session.reference.identity if session.reference else None,
        }
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            except OSError as fault:
                self._fail(fault)
        agree_on_error(self._error, self.topology)
        if session.planner:
            self._learned = session.planner.learned
            self._records = self._learned.snapshot()
            if self.topology.dp_rank == 0:
                prior = self._learned.prior
                self._mean_V = prior.mean_V.masked_fill(~prior.is_seen_V, math.nan).numpy()
                self._content["prior"] = {"overall": prior.overall, "any_seen": prior.any_seen}

    def write(self, *, in_background: bool = False) -> None:
        """Write this rank's part; only planners have one."""
        if self._records is None:
            return
        if in_background:
            self._thread = threading.Thread(target=self._write, name="regate-save")
            self._thread.start()
        else:
            self._write()

    def finish(self) -> None:
        """Wait until every part is written, then write the manifest; all ranks call this, over the world's gloo group.

        Raises:
            ReGateError: a part could not be written; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
        if self._records is not None:
            self._learned.release()
            files = self._gather_facts()
            if self.topology.dp_rank == 0 and self._error is None:
                try:
                    facts = {"difficulty": [dataclasses.asdict(one) for one in files]}
                    write_manifest(self.aside, self._content | facts | {"prior_file": vars(self._prior_facts)})
                except OSError as fault:
                    self._fail(fault)
        agree_on_error(self._error, self.topology)

    def publish(self, folder: Path) -> None:
        """Put the finished folder where it belongs; one rank calls this, after :meth:`finish`."""
        replace_folder(self.aside, folder)

    def _write(self) -> None:
        try:
            self._facts = write_records(self.aside / records_name(self.topology.dp_rank), self._records)
            if self.topology.dp_rank == 0:
                self._prior_facts = write_array(self.aside / PRIOR, self._mean_V)
        except Exception as fault:  # raised by finish, on every rank
            self._fail(fault)

    def _fail(self, fault: Exception) -> None:
        line = refuse("saving difficulty", given=f"{fault!r}", allowed="a folder with room for it", change="--save")
        self._error = str(line)

    def _gather_facts(self) -> list[FileFacts]:
        """Every planner's file, on every planner."""
        one, checksum = self._facts, np.frombuffer(bytes.fromhex(self._facts.checksum), "<i8")
        own_5 = torch.tensor([one.bytes, one.num_samples, one.num_targets, *checksum.tolist()])
        all_D5 = self.topology.all_gather_planners(own_5)
        return [
            FileFacts(size, np.array(checksum, "<i8").tobytes().hex(), samples, targets)
            for size, samples, targets, *checksum in (facts_5.tolist() for facts_5 in all_D5)
        ]


def save_state(session: Session, folder: Path) -> None:
    """Save into ``folder``, all of it or nothing, with a teacher taken from the student. All ranks call this, in step.

    Raises:
        ReGateError: it could not be written; on every rank.
    """
    session.open_teacher()
    with filled_by_all_ranks(folder, "saving difficulty", session.topology.world_group) as aside:
        save = StateSave(session, aside, session.steps_done)
        save.write()
        if is_taken_from_student(session):  # nobody else has it once the student has learned
            save_language_model(
                session.reference.require_teacher().chunks, aside / TEACHER, session.topology.world_group
            )
        save.finish()


def load_state(session: Session, folder: Path) -> str:
    """Continue from what :func:`save_state` left in ``folder``; returns a line that says what came back.

    All ranks call this, in step, before the first step; planners read, the world's gloo group is used. The teacher is
    opened here: it must be the one there was.

    Raises:
        ReGateError: there is nothing, or it is damaged, or a teacher taken from the student is not the one there was;
            on every rank, and nothing learned has changed.
    """
    error, manifest, learned = None, {}, None
    try:
        manifest = read_manifest(folder)
        if session.planner:
            learned = _read(folder, manifest, session)
    except Exception as fault:  # whatever it is, the other ranks wait to hear of it
        error = str(fault) if isinstance(fault, ReGateError) else f"regate: saved difficulty: {folder}: {fault!r}"
    agree_on_error(error, session.topology)
    said = _continue_teaching(session, folder, manifest.get("teacher"))
    if session.planner:
        session.planner.learned.adopt(*learned)
    names = {field.name for field in dataclasses.fields(Counters)}
    totals = Counters(**{name: count for name, count in manifest["totals"].items() if name in names})
    totals = totals if session.topology.dp_rank == 0 else Counters()  # they are summed over replicas
    session.restore(manifest["step"], manifest["dense_until"], totals)
    if session.config.learns and not manifest["learns"]:
        session.resume(manifest["step"])
    return _summary(session, manifest) + said


def is_taken_from_student(session: Session) -> bool:
    """Whether the teacher is the student as it was at the first start."""
    source = session.teacher_source
    return source is not None and source.model is None and session.config.teacher_load == STUDENT_AS_TEACHER


def _continue_teaching(session: Session, folder: Path, before: dict[str, Any] | None) -> str:
    """Have the teacher that there was; returns what to say of one that the user has changed. All ranks call this.

    Raises:
        ReGateError: the teacher is the student, and another one than it was; on every rank.
    """
    source, from_student = session.teacher_source, is_taken_from_student(session)
    if before is None or source is None:
        return ""
    if from_student and source.checkpoint is None and has_state(folder / TEACHER, session.topology):
        error = kept = None
        try:
            kept = open_language_model(folder / TEACHER, "saved teacher")
        except Exception as fault:  # whatever it is, the other ranks wait to hear of it
            error = str(fault) if isinstance(fault, ReGateError) else f"regate: saved teacher: {folder}: {fault!r}"
        agree_on_error(error, session.topology)
        session.teach_with(dataclasses.replace(source, checkpoint=kept))
    found = differences(before, session.open_teacher().identity)
    if from_student and any(not name.startswith(_NOT_THE_TEACHER) for name in found):
        error = teacher_is_gone(f"a run that goes on with another teacher than it had ({'; '.join(found)})")
        error.everywhere = True  # every rank compares the same two
        raise error
    return f"; the teacher is another one than before: {'; '.join(found)}" if found else ""


def has_state(folder: Path, topology: Topology) -> bool:
    """Whether any rank sees a saved state there; all ranks call this, over the world's gloo group."""
    seen = torch.tensor([int(folder.is_dir())])
    dist.all_reduce(seen, dist.ReduceOp.MAX, group=topology.world_group)
    return bool(seen)


def _read(folder: Path, manifest: dict[str, Any], session: Session) -> tuple[Records, TokenPrior]:
    rank, size = session.topology.dp_rank, session.topology.dp_size
    files = [FileFacts(**facts) for facts in manifest["difficulty"]]
    records = session.planner.learned.empty_records()
    for index in files_to_read(rank, size, len(files)):
        path = folder / records_name(index)
        for saved in read_records(path, files[index], lambda key_N2: key_N2[:, 0] % size == rank):
            records.append(saved.key_N2, saved.count_N, saved.seen_N, saved.value_X)
    records.evict()
    prior = TokenPrior(session.config.ema_decay)
    mean_V = torch.from_numpy(read_array(folder / PRIOR, FileFacts(**manifest["prior_file"]), _FLOAT64))
    prior.mean_V, prior.is_seen_V = mean_V.nan_to_num(0.0), ~mean_V.isnan()
    prior.overall, prior.any_seen = manifest["prior"]["overall"], manifest["prior"]["any_seen"]
    return records, prior


def files_to_read(rank: int, size: int, num_files: int) -> range:
    """The files of another run that can hold samples of planner ``rank`` of ``size``.

    A key k lies in file k mod F and belongs to planner k mod D: the two are equal mod gcd(F, D).
    """
    step = math.gcd(num_files, size)
    return range(rank % step, num_files, step)


def _settings(config: Any) -> dict[str, Any]:
    """The settings as JSON keeps them; a fingerprint to compare a resumed run with."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_SETTINGS}


def _summary(session: Session, manifest: dict[str, Any]) -> str:
    samples, targets = (sum(file[name] for file in manifest["difficulty"]) for name in ("num_samples", "num_targets"))
    before, now = manifest["settings"], _settings(session.config)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    line = f"difficulty of {targets:,} targets in {samples:,} samples restored"
    return line + (f"; settings changed: {', '.join(changed)}" if changed else "")


__all__ = ["MANIFEST", "STATE_FOLDER", "StateSave", "has_state", "load_state", "save_state"]
