"""What a CPU takes out of a cluster's line goes with all that needs it: checked against Megatron's own parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import ROOT
from tests.scripts.checkouts import found

PLACES = [pytest.param("", id="installed"), *(pytest.param(str(c.path), id=c.version) for c in found())]


def _tried(place: str) -> dict:
    command = [sys.executable, "tests/scripts/run_taken_out.py", *([place] if place else [])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", PLACES)
def test_no_switch_is_refused_for_what_was_taken_out(place):
    pytest.importorskip("megatron.training", reason="megatron.training is not installed")
    said = _tried(place)
    assert said["tried"] > 400 and said["broken"] == {}


def test_every_name_in_the_tables_is_an_option_of_some_version():
    places = [parameter.values[0] for parameter in PLACES[1:]]
    if len(places) < 2:
        pytest.skip("set MEGATRON_LM_DIRS=<checkouts of the oldest and the newest version, colon separated>")
    unknown = [set(_tried(place)["unknown"]) for place in places]
    assert set.intersection(*unknown) == set()
