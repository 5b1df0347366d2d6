"""Reference losses and their cache, on one rank and on four; each claim is a function of run_reference.py."""

from __future__ import annotations

import ast
import json

import pytest

from tests.launch import ROOT, succeed

WORKER = ROOT / "tests/multiprocess/run_reference.py"
LAYOUTS = ["1x1", "1x1 on four", "2x2"]  # TP x PP
MORE_LAYOUTS = ["2x1", "1x2"]
CLAIMS = [
    node.name
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and [arg.arg for arg in node.args.args] == ["case", "folder"]
]
CLAIMS.remove("make_teacher")


def _run(num_ranks: int, folder, *layouts: str) -> dict:
    succeed(num_ranks, [str(WORKER), str(folder), str(folder / "results.json"), *layouts], timeout_s=800)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    one = _run(1, tmp_path_factory.mktemp("one"), "1x1")
    four = _run(4, tmp_path_factory.mktemp("four"), "1x1", "2x2")
    four = {name.replace("@1x1", "@1x1 on four"): value for name, value in four.items()}
    return one | four


@pytest.fixture(scope="module")
def more_results(results, tmp_path_factory) -> dict:
    return results | _run(4, tmp_path_factory.mktemp("more"), *MORE_LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds(results, claim, layout):
    assert f"{claim}@{layout}" in results


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds_in_more_layouts(more_results, claim, layout):
    assert f"{claim}@{layout}" in more_results


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_give_the_same_reference_losses(results, layout):
    _same_losses(results, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_more_layouts_give_the_same_reference_losses(more_results, layout):
    _same_losses(more_results, layout)


def _same_losses(results: dict, layout: str) -> None:
    claim = "layouts_score_alike_whatever_the_students_dropout"
    alone, here = results[f"{claim}@1x1"], results[f"{claim}@{layout}"]
    for model in ("gpt", "llava"):
        assert len(alone[model]) == 8 and alone[model].keys() == here[model].keys()
        for key, losses in alone[model].items():
            assert here[model][key] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    assert alone["gpt"] != alone["llava"]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_give_the_fixed_row_the_same_losses(results, layout):
    """What the tolerance of float32 is chosen by: layouts differ by far less than 1e-3."""
    claim = "teacher_that_no_list_tells_apart_is_found_by_a_fixed_row"
    alone, here = (results[f"{claim}@{name}"]["losses"] for name in ("1x1", layout))
    assert len(alone) == 31 and here == pytest.approx(alone, rel=1e-5)


def test_every_layout_has_the_same_fingerprint(results):
    assert len({results[f"fingerprint_is_of_the_weights_alone@{layout}"]["weights"] for layout in LAYOUTS}) == 1
