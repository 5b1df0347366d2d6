"""A fault on any rank, in any stage of a step, a save or a load, is one line on all ranks of all replicas, and none is
left behind.
"""

from __future__ import annotations

import json

import pytest

from tests.launch import ROOT, succeed

PLACES = (
    "peek on a planner",
    "peek on a rank that is no planner",
    "read",
    "read on both planners",
    "before the planners' first exchange",
    "between their exchanges",
    "before the last exchange",
    "sharing on one that receives",
    "another plan than the planner's",
    "two ranks of two replicas in two places",
    "learning",
    "making the folder of a save",
    "writing one planner's part",
    "renaming what was saved",
    "looking for saved state",
    "reading the manifest",
    "reading one planner's records",
    "naming the teacher",
    "a rank that never has data",
    "before a deal's exchanges",
    "packing what leaves",
    "reading what came",
    "bytes that are no microbatch",
    "a rank that has no data any more",
    "another number of microbatches",
    "data that end on one rank",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("together") / "results.json"
    succeed(4, [str(ROOT / "tests/multiprocess/run_together.py"), str(path)], timeout_s=240)
    return json.loads(path.read_text())


@pytest.mark.parametrize("place", PLACES)
def test_every_rank_outlives_the_fault_and_says_the_same_line(results, place):
    lines, words = results["heard"][place], results["expected"][place]
    assert len(lines) == 4 and len(set(lines)) == 1, lines
    line = lines[0]
    assert line.startswith("regate: ") and words in line and "\n" not in line
    assert all(word in line for word in ("given", "allowed", "change"))


def test_every_place_was_tried(results):
    assert set(results["heard"]) == set(PLACES)
