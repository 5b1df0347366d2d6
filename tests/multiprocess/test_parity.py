"""A sparse step is the masked full-length step, and every layout picks the same tokens. Real Megatron models, fp32.

The batch holds a row without targets, one of targets only, one with a single target, and padded ones.
"""

from __future__ import annotations

import json

import pytest

from tests.launch import ROOT, succeed

WORKER = "tests/multiprocess/run_parity.py"


def case(name: str, **options) -> dict:
    return {"name": name, "model": "gpt", "tp": 1, "pp": 1, "dense_layers": 1, **options}


def _grid(layout: str, recomputes: tuple, **options) -> list[dict]:
    return [
        case(f"{model}-n{n}-{method or 'plain'}{layout}", model=model, dense_layers=n, recompute=method, **options)
        for model in ("gpt", "llava")
        for n in (0, 1)
        for method in recomputes
    ]


ONE_RANK = [
    *_grid("", (None, "uniform", "block")),
    case("gpt-n2-block", dense_layers=2, recompute="block"),
    case("llava-n2-plain", model="llava", dense_layers=2),
    case("gpt-n1-learned-positions", positions="learned_absolute"),
    case("gpt-n1-student", score="student"),
    case("llava-n1-pad", model="llava", visual="pad"),
    case("gpt-n1-per-sample", budget="per-sample"),
    case("llava-n1-per-sample", model="llava", budget="per-sample"),
    case("gpt-n1-even", multiple=2),
    case("gpt-n1-tied-grouped", tied=True, groups=2),
    case("llava-n1-learned-positions", model="llava", positions="learned_absolute"),
]
FOUR_RANKS = [
    *_grid("@tp2-pp2", (None, "uniform"), tp=2, pp=2),
    *(case(f"{m}-n1-plain@tp2-dp2", model=m, tp=2) for m in ("gpt", "llava")),
    *(case(f"{m}-n1-plain@pp2-dp2", model=m, pp=2) for m in ("gpt", "llava")),
    *(case(f"{m}-n1-plain@dp4", model=m) for m in ("gpt", "llava")),
    case("gpt-n2-block@tp2-pp2", tp=2, pp=2, dense_layers=2, recompute="block"),
    case("gpt-n1-learned-positions@tp2-pp2", tp=2, pp=2, positions="learned_absolute"),
    case("llava-n1-pad@tp2-pp2", model="llava", tp=2, pp=2, visual="pad"),
    case("gpt-n1-per-sample@tp2-dp2", tp=2, budget="per-sample"),
    case("gpt-n1-even@tp2-sp-pp2", tp=2, pp=2, sp=True, multiple=2),
    case("gpt-n1-tied-grouped@tp2-pp2", tp=2, pp=2, tied=True, groups=2),
    case("gpt-n1-student@pp2-vpp2-dp2", pp=2, vpp=2, score="student"),
]


def run_cases(num_ranks: int, cases: list[dict], folder) -> dict:
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    succeed(num_ranks, [str(ROOT / WORKER), str(given), str(results)])
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return run_cases(1, ONE_RANK, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> dict:
    return run_cases(4, FOUR_RANKS, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", [case["name"] for case in ONE_RANK])
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert one_rank[name]["loss_error"] <= 2e-6
    assert one_rank[name]["gradient_error"] <= 1e-5


@pytest.mark.parametrize("name", [case["name"] for case in FOUR_RANKS])
def test_sparse_step_equals_masked_dense_step_in_layout(four_ranks, name):
    assert four_ranks[name]["loss_error"] <= 2e-6
    assert four_ranks[name]["gradient_error"] <= 1e-5


@pytest.mark.parametrize("name", [case["name"] for case in FOUR_RANKS])
def test_layout_keeps_the_same_positions(one_rank, four_ranks, name):
    alone, here = one_rank[name.split("@")[0]]["kept"], four_ranks[name]["kept"]
    assert alone.keys() == here.keys() and len(alone) == 8
    for key, (kept, loss, length) in alone.items():
        assert here[key][0] == kept
        assert here[key][1] == pytest.approx(loss, rel=1e-5, abs=1e-5)
        assert here[key][2] == length or "per-sample" in name
