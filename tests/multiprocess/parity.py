"""What the parity tests share: cases, how they are launched, and what must hold of every result."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT, succeed

WORKER = "tests/multiprocess/run_parity.py"
# Of each target's loss, over the loss or 1 if that is more; of each gradient, over its tensor's largest or 1.
LOSS_BOUND, GRADIENT_BOUND = 1e-6, 1e-5


def case(name: str, **options) -> dict:
    """One case of run_parity.py; ``NAME@LAYOUT`` is compared with the case NAME on one rank."""
    return {"name": name, "model": "gpt", "tp": 1, "pp": 1, "dense_layers": 1, **options}


def names(cases: Sequence[dict]) -> list[str]:
    """What to parametrize a test with."""
    return [case["name"] for case in cases]


def parameters(cases: Sequence[dict], full: Collection[str] = ()) -> list:
    """What to parametrize a test with; the names in ``full`` run with `make test-full` only."""
    return [pytest.param(name, marks=[pytest.mark.full] if name in full else []) for name in names(cases)]


def run_cases(num_ranks: int, cases: list[dict], folder: Path, timeout_s: int = 900, **options) -> dict:
    """Results by name, of one launch; ``options`` are those of ``torchrun`` in tests/launch.py."""
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    succeed(num_ranks, [str(ROOT / WORKER), str(given), str(results)], timeout_s=timeout_s, **options)
    return json.loads(results.read_text())


def launched(num_ranks: int, cases: Sequence[dict], *more: str) -> Callable[..., dict]:
    """A fixture of a module: results by name, of one launch.

    Of the cases that the selected tests ask for by ``name``, those they are compared with, and ``more``.
    """

    @pytest.fixture(scope="module")
    def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
        items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
        asked = {item.callspec.params.get("name", "") for item in items}
        asked |= {name.split("@")[0] for name in asked} | set(more)
        selected = [case for case in cases if case["name"] in asked]
        return run_cases(num_ranks, selected, tmp_path_factory.mktemp("ranks"))

    return results


def assert_exact(result: dict) -> None:
    """The sparse step was the masked full-length step, in fp32."""
    assert result["loss_error"] <= LOSS_BOUND, result["loss_error"]
    assert result["gradient_error"] <= GRADIENT_BOUND, result["gradient_error"]


def assert_keeps_the_same(alone: dict, here: dict, num_samples: int) -> None:
    """A layout keeps the positions of one rank, at the same losses."""
    alone, here = alone["kept"], here["kept"]
    assert alone.keys() == here.keys() and len(alone) == num_samples
    for key, (kept, loss, _) in alone.items():
        assert here[key][0] == kept
        assert here[key][1] == pytest.approx(loss, rel=1e-5, abs=1e-5)
