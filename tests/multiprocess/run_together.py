"""Worker of test_together: a fault in every stage of a step, of a save and of a load, on every kind of rank.

In a loop of one's own ranks outlive the fault: they catch it, say what they heard, and take another step that must go
well. Two replicas of two tensor-parallel ranks each.

    torchrun --nproc-per-node 4 tests/multiprocess/run_together.py RESULTS.json
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import (
    ReGateConfig,
    ReGateError,
    attach,
    detach,
    load_state,
    save_state,
    step_done,
    wrap_forward_backward,
)
from regate_megatron.api import session_of
from regate_megatron.memory import state
from regate_megatron.method.plan import StepPlan
from regate_megatron.ranks import publishing, rows
from regate_megatron.step import dealing
from regate_megatron.step import session as sessions
from regate_megatron.teacher import fingerprint
from tests.multiprocess.models import Step, build, parallel, run, shared_store

CASE = {"name": "together", "model": "gpt", "tp": 2, "pp": 1, "dense_layers": 1}
SETTINGS = {"warmup_steps": 1, "cycle_steps": 1000, "dense_steps": 0, "teacher_load": "student", "score": "regate"}
DEALT = SETTINGS | {"budget": "dealt", "length_multiple": 1}


def fail(*_, **__):
    raise IndexError(f"rank {dist.get_rank()} has a fault")


def data_ends(iterator, count):
    raise StopIteration


def another_plan(inner):
    def unpack(flat):
        plan = inner(flat)
        plan.microbatches[-1].keep_idx_BK[-1, -1] += 1
        return plan

    return unpack


def no_microbatch(given):
    return rows_unpack(given[: len(given) // 2 // 16 * 16])


rows_unpack = rows.unpack


def no_data(iterator, count):
    return None


def a_shorter_batch(inner):
    return lambda step, arguments, dealing: inner(step, {**arguments, "num_microbatches": 3}, dealing)


pull = sessions.pull


def too_few(iterator, count):
    return pull(iterator, count + 1)


def faults_of_deals(session) -> dict:
    """As :func:`faults`, where rows are dealt."""
    planner, word = session.planner, "has a fault"
    fewer = a_shorter_batch(session._read)
    return {
        "before a deal's exchanges": ([2], planner, "asked", fail, "rank 2 " + word),
        "packing what leaves": ([1], dealing, "pack", fail, "rank 1 " + word),
        "reading what came": ([3], rows, "unpack", fail, "rank 3 " + word),
        "bytes that are no microbatch": ([0], rows, "unpack", no_microbatch, "rows: given ValueError: a microbatch"),
        "a rank that has no data any more": ([3], sessions, "pull", no_data, "data in one step and none in another"),
        "another number of microbatches": ([2, 3], session, "_read", fewer, "from 3 to 4 microbatches"),
        "data that end on one rank": ([3], sessions, "pull", too_few, "the end of its data after 4 of 5"),
    }


def faults(session) -> dict:
    """By name: the ranks that fail, what they patch (object, name, value), and what all ranks must hear."""
    planner, word = session.planner, "has a fault"
    return {
        "peek on a planner": ([0], sessions, "pull", data_ends, "data"),
        "peek on a rank that is no planner": ([1], sessions, "pull", fail, "rank 1 " + word),
        "read": ([2], type(session.adapter), "read", fail, "rank 2 " + word),
        "read on both planners": ([0, 2], type(session.adapter), "read", fail, "rank 0 " + word),
        "before the planners' first exchange": ([2], planner, "plan", fail, "rank 2 " + word),
        "between their exchanges": ([0], planner, "_candidates", fail, "rank 0 " + word),
        "before the last exchange": ([2], planner, "_with_room_for_segments", fail, "rank 2 " + word),
        "sharing on one that receives": ([3], StepPlan, "unpack", fail, "rank 3 " + word),
        "another plan than the planner's": ([1], StepPlan, "unpack", another_plan(StepPlan.unpack), "different plans"),
        "two ranks of two replicas in two places": ([1, 2], None, None, None, "rank 1 " + word),
        "learning": ([2], planner, "learn", fail, "rank 2 " + word),
    }


def faults_beside_steps(models, folder: Path) -> dict:
    """As :func:`faults`, and last what is done in place of a step."""
    session, word = session_of(models), "has a fault"

    def save() -> None:
        save_state(models, folder / "other")

    def load() -> None:
        load_state(models, folder / "whole")

    def name_teacher() -> None:
        fingerprint.fingerprint_of_model(session.reference.run.chunks, session.topology)

    return {
        "making the folder of a save": ([0], publishing, "claimed", fail, "rank 0 " + word, save),
        "writing one planner's part": ([2], state, "write_records", fail, "rank 2 " + word, save),
        "renaming what was saved": ([0], publishing, "replace_folder", fail, "rank 0 " + word, save),
        "looking for saved state": ([1], Path, "is_dir", fail, "rank 1 " + word, load),
        "reading the manifest": ([3], state, "read_manifest", fail, "rank 3 " + word, load),
        "reading one planner's records": ([2], state.RecordFile, "open", fail, "rank 2 " + word, load),
        "naming the teacher": ([1], fingerprint, "sums_of", fail, "cannot be read (IndexError)", name_teacher),
    }


@contextmanager
def patched(place, name, value):
    had = name in vars(place)
    before = vars(place).get(name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before) if had else delattr(place, name)


@contextmanager
def fault(session, ranks, place, name, value):
    rank = dist.get_rank()
    if place is None and rank in ranks:
        place, name, value = (sessions, "pull", fail) if rank == 1 else (type(session.adapter), "read", fail)
    if rank not in ranks:
        yield
    else:
        with patched(place, name, value):
            yield


class Tried:
    """A model with ReGATE and the faults it meets; ``found`` gets what all ranks heard of each, and must hear."""

    def __init__(self, case: dict, settings: dict, found: dict) -> None:
        self.case, self.found = case, found
        self.models = attach(build(case), ReGateConfig(**settings), pad_token=0)
        self.session = session_of(self.models)
        self._schedule = wrap_forward_backward(get_forward_backward_func())

    def step(self) -> None:
        run(self.case, self.models, self._schedule, Step())
        step_done(self.models)

    def hear(self, name: str, ranks: list, place, attribute: str | None, value, words: str, act=None) -> None:
        line, lines = None, [None] * dist.get_world_size()
        with fault(self.session, ranks, place, attribute, value):
            try:
                (act or self.step)()
            except ReGateError as error:
                line = str(error)
        step_done(self.models, counted=False)
        dist.all_gather_object(lines, line)  # every rank is there to say so
        self.found["heard"][name], self.found["expected"][name] = lines, words

    def hear_each(self, faults: dict) -> None:
        """Every fault, and a step after it."""
        for name, what in faults.items():
            self.hear(name, *what)
            before = self.session.totals.sparse_steps
            self.step()
            done = torch.tensor([self.session.totals.sparse_steps - before if self.session.planner else 1])
            dist.all_reduce(done, dist.ReduceOp.MIN)
            assert int(done) == 1, f"after {name} no step went well"
        detach(self.models)


def main(results: Path) -> None:
    found: dict[str, dict] = {"heard": {}, "expected": {}}
    with parallel(CASE, shared_store()):
        tried = Tried(CASE, SETTINGS, found)
        tried.step()  # the dense one
        folder = results.parent / "states"
        save_state(tried.models, folder / "whole")
        tried.hear_each(faults(tried.session) | faults_beside_steps(tried.models, folder))
        tried = Tried(CASE | {"rows": 1, "uneven": True}, DEALT, found)
        # ranks find their peers in the first step
        no_peer = ([3], sessions, "pull", no_data, "on some of the ranks [1, 3]")
        tried.hear("a rank that never has data", *no_peer)
        tried.step()  # the dense one
        tried.hear_each(faults_of_deals(tried.session))
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
