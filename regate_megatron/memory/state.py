"""What a run has learned and how far it is, saved into a folder and loaded from it: at another data-parallel size too.

- ``difficulty-00003.records``: the difficulty of one planner, see :mod:`.files`; nobody holds more than its share.
- ``prior.table``: the mean loss per token id, NaN where never seen; or what is known of kinds of targets.
- ``state.json``, written last: how far the run is, its settings, and the seal of every file, see :mod:`.manifests`.

On loading, a planner reads the files that can hold keys it owns and keeps those. Difficulty, prior, schedule position
and totals come back bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regate_megatron.errors import refuse
from regate_megatron.memory.difficulty import TokenPrior
from regate_megatron.memory.files import (
    RECORDS,
    TABLE,
    DamagedFile,
    FileFacts,
    RecordFile,
    read_table,
    write_records,
    write_table,
)
from regate_megatron.memory.kinds import KindMeans
from regate_megatron.memory.learned import Learned
from regate_megatron.memory.manifests import FORMAT, OtherFormat, read_manifest, write_manifest
from regate_megatron.memory.records import Records
from regate_megatron.ranks.publishing import replace_folder
from regate_megatron.ranks.topology import Topology

STATE_FOLDER = "regate"  # in the folder of an iteration
MANIFEST = "state.json"
PRIOR = f"prior{TABLE}"
_FLOAT64 = np.dtype("<f8")
_NOTHING = FileFacts(0, 0)
_SAVING = {"doing": "saving difficulty", "allowed": "a folder with room for it", "change": "--save"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, the same on every rank; plain values, as JSON keeps them.

    Attributes:
        step: steps done.
        dense_until: steps before this one are dense whatever the schedule says.
        learns: whether its scores use the student's losses.
        settings: what its plans depend on.
        totals: counts of all replicas since the run began, by name.
        teacher: who the teacher is; None without one.
    """

    step: int
    dense_until: int
    learns: bool
    settings: dict[str, Any]
    totals: dict[str, int]
    teacher: dict[str, Any] | None


@dataclass(frozen=True)
class SavedState:
    """What a folder held.

    Attributes:
        progress: how far the run was that saved it.
        num_samples, num_targets: of which it remembered the difficulty, over all planners.
        records, prior: what this planner goes on with; None on ranks that are none. The prior is empty where difficulty
            was of another sort before.
    """

    progress: Progress
    num_samples: int
    num_targets: int
    records: Records | None = None
    prior: TokenPrior | KindMeans | None = None


class StateSave:
    """One save in flight: made, written, finished, and published by a rename. All ranks make and finish it, in step.

    What is saved is the state at the time of making; :meth:`write` may run in a thread while training goes on. Until
    :meth:`finish`, blocks of records that training changes exist twice.

    Args:
        learned: what this planner has learned, of all steps that counted; None on ranks that are no planner.
        progress: how far the run is.
        aside: a folder for this save alone, beside the checkpoint; emptied here.

    Raises:
        ReGateError: the folder cannot be made; on every rank.
    """

    def __init__(self, learned: Learned | None, progress: Progress, topology: Topology, aside: Path) -> None:
        self.topology, self.aside = topology, aside
        self._fault: Exception | None = None
        self._thread: threading.Thread | None = None
        self._facts = self._prior_facts = _NOTHING
        self._content = dataclasses.asdict(progress)
        with topology.together(**_SAVING):
            if topology.is_planner and topology.dp_rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        self._learned = learned
        if learned is not None:
            self._records = learned.snapshot()
            if topology.dp_rank == 0:
                self._prior_X, self._content["prior"] = learned.prior.snapshot()

    def write(self, *, in_background: bool = False) -> None:
        """Write this rank's part; only planners have one."""
        if self._learned is None:
            return
        if in_background:
            self._thread = threading.Thread(target=self._write, name="regate-save")
            self._thread.start()
        else:
            self._write()

    def finish(self) -> None:
        """Wait until every part is written, then write the manifest; all ranks call this.

        Raises:
            ReGateError: a part could not be written; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
        with self.topology.together(**_SAVING):
            if self._learned is None:
                return
            self._learned.release()
            if self._fault is not None:
                raise self._fault
            files = self._gather_facts()
            if self.topology.dp_rank == 0:
                facts = {"difficulty": [vars(one) for one in files], "prior_file": vars(self._prior_facts)}
                write_manifest(self.aside / MANIFEST, self._content | facts)

    def publish(self, folder: Path) -> None:
        """Put the finished folder where it belongs; one rank calls this, after :meth:`finish`."""
        replace_folder(self.aside, folder)

    def _write(self) -> None:
        try:
            path = self.aside / records_name(self.topology.dp_rank)
            self._facts = write_records(path, len(self._records), self._records.pieces)
            if self.topology.dp_rank == 0:
                self._prior_facts = write_table(self.aside / PRIOR, self._prior_X)
        except Exception as fault:  # raised by finish, on every rank
            self._fault = fault

    def _gather_facts(self) -> list[FileFacts]:
        """Every planner's file, on every planner."""
        all_D3 = self.topology.all_gather_planners(torch.tensor(dataclasses.astuple(self._facts)))
        return [FileFacts(*facts_3.tolist()) for facts_3 in all_D3]


def records_name(dp_rank: int) -> str:
    """The file of one planner."""
    return f"difficulty-{dp_rank:05d}{RECORDS}"


def read_state(folder: Path, topology: Topology, learned: Learned | None) -> SavedState:
    """What a finished save left in ``folder``; all ranks call this, in step. Nothing changes.

    Args:
        learned: of this planner, for its bound and decay; None on ranks that are no planner.

    Raises:
        ReGateError: there is nothing, or it is damaged; on every rank.
    """
    with topology.together("saved difficulty", allowed="the complete folder as it was saved", change="the folder"):
        with _refusing_damage(folder / MANIFEST):
            manifest = read_manifest(folder / MANIFEST)
        files = [FileFacts(**facts) for facts in manifest["difficulty"]]
        return SavedState(
            Progress(**{field.name: manifest[field.name] for field in dataclasses.fields(Progress)}),
            sum(one.num_records for one in files),
            sum(one.num_values for one in files),
            *(_read(folder, manifest, files, topology, learned) if learned is not None else ()),
        )


def has_state(folder: Path, topology: Topology) -> bool:
    """Whether any rank sees a folder there; all ranks call this."""
    with topology.together("looking for saved difficulty", allowed="a folder that can be read") as stage:
        stage.wish = folder.is_dir()
    return stage.anyone_wishes


def files_to_read(rank: int, size: int, num_files: int) -> range:
    """The files of another run that can hold samples of planner ``rank`` of ``size``.

    A key k lies in file k mod F and belongs to planner k mod D: the two are equal mod gcd(F, D).
    """
    step = math.gcd(num_files, size)
    return range(rank % step, num_files, step)


def _read(
    folder: Path, manifest: dict[str, Any], files: list[FileFacts], topology: Topology, learned: Learned
) -> tuple[Records, TokenPrior | KindMeans]:
    rank, size, records = topology.dp_rank, topology.dp_size, learned.empty_records()
    for index in files_to_read(rank, size, len(files)):
        with _refusing_damage(path := folder / records_name(index)):
            file, entry_N = RecordFile.open(path)
            _compare(file.facts, files[index])
            for piece in file.pieces(entry_N, lambda key_N2: key_N2[:, 0] % size == rank):
                records.append(piece)
    records.evict()
    prior, words = learned.empty_prior(), manifest["prior"]
    with _refusing_damage(folder / PRIOR):
        values, facts = read_table(folder / PRIOR, _FLOAT64)
        _compare(facts, FileFacts(**manifest["prior_file"]))
    if words.get("of", "own") == prior.name:
        prior.restore(values, words)
    return records, prior


def _compare(found: FileFacts, expected: FileFacts) -> None:
    if found != expected:
        raise DamagedFile("the content of another save")


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    empty = "add --regate-reset-difficulty to start it empty"
    try:
        yield
    except OtherFormat as error:
        form = {"allowed": f"format {FORMAT}", "change": f"to the version that saved it, or {empty}"}
        raise refuse("saved difficulty", given=f"{path} of {error}", **form) from error
    except (DamagedFile, OSError) as error:
        what = f"no file to read ({error.strerror})" if isinstance(error, OSError) else str(error)
        form = {"allowed": "the complete folder as it was saved"}
        form["change"] = f"to an earlier checkpoint (--ckpt-step), or {empty}"
        raise refuse("saved difficulty", given=f"{path} with {what}", **form) from error
