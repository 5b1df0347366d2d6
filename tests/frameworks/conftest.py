"""All trainings by Megatron-Bridge in one process, which imports it once; the tests look at what they left."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT

SECONDS = 1500


BRIDGE = ("transformer_engine", "megatron.bridge", "modelopt", "nvidia_resiliency_ext")


def missing(*names: str) -> str:
    """Why Megatron-Bridge, or the packages named, cannot be imported here; empty where they can."""
    for name in names or BRIDGE:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed (make test-frameworks has it)"
    return ""


@dataclasses.dataclass(frozen=True)
class Trainings:
    """What the cases of run_bridge left behind."""

    folder: Path

    def __getitem__(self, case: str) -> dict[str, Any]:
        """What the last rank saw."""
        return json.loads((self.folder / f"{case}.json").read_text())

    def log(self, case: str) -> str:
        """The output of its first rank."""
        return (self.folder / f"{case}.log.0").read_text()

    def trace(self, case: str) -> list[dict[str, Any]]:
        """One record per microbatch, of all replicas."""
        files = sorted((self.folder / case / "trace").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def kept(self, case: str) -> dict[tuple[int, str], list[int]]:
        """The kept positions of every sample of every iteration."""
        records = self.trace(case)
        return {(one["iteration"], row["sample_key"]): row["kept"] for one in records for row in one["rows"]}

    def state(self, case: str, iteration: int) -> dict[str, Any]:
        """The manifest of what was learned, in the checkpoint of an iteration: with a checksum of every file."""
        folder = self.folder / case / "checkpoints" / f"iter_{iteration:07d}" / "regate"
        return json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Trainings:
    """Trained once per session; a case that failed is reported with the output of its ranks."""
    return _trained_by("run_bridge", tmp_path_factory.mktemp("bridge"))


@pytest.fixture(scope="session")
def recipes(tmp_path_factory) -> Trainings:
    """Megatron-Bridge's official recipes, shrunk, trained once per session."""
    return _trained_by("run_recipes", tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="session")
def swift(tmp_path_factory) -> Trainings:
    """mcore-bridge's models over ms-swift's batches, trained once per session."""
    return _trained_by("run_mcore", tmp_path_factory.mktemp("mcore"))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory) -> Trainings:
    """ms-swift's trainer, trained once per session."""
    return _trained_by("run_swift", tmp_path_factory.mktemp("swift"))


def _trained_by(worker: str, folder: Path) -> Trainings:
    worker = [sys.executable, "-m", f"tests.frameworks.{worker}", str(folder)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run(worker, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-12000:]
    return Trainings(folder)
