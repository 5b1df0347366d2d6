"""The claims of test_parity on eight ranks: layouts that need three kinds of parallelism at once."""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, names, run_cases
from tests.multiprocess.test_parity import OVERLAP
from tests.multiprocess.test_parity_lengths import GATHERED, PACKED, SENT, each_budget
from tests.multiprocess.test_parity_models import MLA, MOE

pytestmark = pytest.mark.full

ONE_RANK = [
    *(case(f"{m}-by4", model=m, multiple=4) for m in ("gpt", "llava")),
    *(case(f"{m}-by8", model=m, multiple=8) for m in ("gpt", "llava")),
    case("gpt"),
    case("llava", model="llava"),
    case("packed-rows1", packed=True, rows=1),
    case("moe-by4", config=MOE, multiple=4),
    case("mla-by4", mla=True, config=MLA, multiple=4),
    case("hybrid-moe-by2", model="hybrid", pattern="*E*E", config=MOE, multiple=2),
    *each_budget("gpt-by4@dp1", multiple=4),
    *each_budget("llava-by4@dp1", model="llava", multiple=4),
    *each_budget("packed-by4@dp1", multiple=4, **PACKED),
    # what rows that are dealt keep
    *(case(f"{m}-dealt-by4", model=m, rows=1, budget="per-sample", multiple=4) for m in ("gpt", "llava")),
    case("moe-dealt", rows=1, budget="per-sample", **SENT),
    case("packed-dealt-by4", budget="per-sample", multiple=4, **PACKED),
]
DEALT = {"rows": 1, "uneven": True, "budget": "dealt"}
DEALT_EIGHT = [
    case("gpt-dealt-by4@tp2-sp-cp2-dp2", tp=2, sp=True, cp=2, multiple=4, recompute="uniform", **DEALT),
    case("llava-dealt-by4@tp2-sp-cp2-dp2", model="llava", tp=2, sp=True, cp=2, multiple=4, **DEALT),
    case("llava-dealt-by4@tp2-sp-pp2-dp2", model="llava", tp=2, sp=True, pp=2, multiple=4, **DEALT),
    case("gpt-dealt-by4@cp2-pp2-vpp2-dp2", cp=2, pp=2, vpp=2, multiple=4, ddp=True, **DEALT, **OVERLAP),
    case("packed-dealt-by4@cp2-pp2-dp2", cp=2, pp=2, multiple=4, **{**DEALT, **PACKED}),
    case("moe-dealt@ep2-pp2-dp4", ep=2, pp=2, ddp=True, **DEALT, **SENT),
    case("moe-dealt@ep2-pp2-dp4-gathered", ep=2, pp=2, recompute="uniform", **DEALT, **GATHERED),
]
EIGHT_RANKS = [
    *(case(f"{m}-by4@tp2-sp-cp2-pp2", model=m, tp=2, sp=True, cp=2, pp=2, multiple=4) for m in ("gpt", "llava")),
    *(
        case(f"{m}-by4@tp2-sp-cp2-dp2", model=m, tp=2, sp=True, cp=2, multiple=4, recompute="uniform")
        for m in ("gpt", "llava")
    ),
    *(case(f"{m}@tp2-pp2-dp2", model=m, tp=2, pp=2) for m in ("gpt", "llava")),
    case("gpt-by4@cp2-pp2-vpp2-dp2", cp=2, pp=2, vpp=2, multiple=4),
    case("gpt@tp2-pp2-vpp2-dp2", tp=2, pp=2, vpp=2, recompute="uniform"),
    case("gpt-by8@cp4-dp2", cp=4, multiple=8),
    case("gpt-by8@tp2-cp4", tp=2, cp=4, multiple=8),
    case("packed-rows1@tp2-sp-cp2-pp2", packed=True, rows=1, tp=2, sp=True, cp=2, pp=2),
    case("moe-by4@tp2-sp-ep2-pp2", config=MOE, tp=2, sp=True, ep=2, etp=1, pp=2, multiple=4),
    case("moe-by4@cp2-ep4", config=MOE, cp=2, ep=4, multiple=4),
    case("mla-by4@tp2-sp-cp2-pp2", mla=True, config=MLA, tp=2, sp=True, cp=2, pp=2, multiple=4),
    case("hybrid-moe-sent@ep2-pp2-dp2", model="hybrid", pattern="*E|*E", config=MOE, ep=2, pp=2, multiple=2),
    # lengths free to differ; what balanced is held against has as many replicas
    *each_budget("moe-sent@tp2-sp-cp2-dp2", tp=2, sp=True, cp=2, etp=1, ep=4, multiple=4, **SENT),
    *each_budget("gpt-by4@tp2-sp-cp2-pp2", "dp1", tp=2, sp=True, cp=2, pp=2, multiple=4, ddp=True),
    *each_budget("llava-by4@tp2-sp-cp2-pp2", "dp1", model="llava", tp=2, sp=True, cp=2, pp=2, multiple=4),
    *each_budget("packed-by4@tp2-sp-cp2-pp2", "dp1", tp=2, sp=True, cp=2, pp=2, multiple=4, **PACKED),
    *each_budget(
        "gpt-by4@tp2-sp-pp2-vpp2-cp2", "dp1", tp=2, sp=True, pp=2, vpp=2, cp=2, multiple=4, ddp=True, **OVERLAP
    ),
    *each_budget("moe-sent@tp2-sp-ep2-pp2-dp2", "tp2-sp-cp2-dp2", tp=2, sp=True, ep=2, pp=2, etp=2, multiple=4, **SENT),
    # one replica has nothing to deal, and keeps what each sample asks for
    case("gpt-dealt-by4@tp2-sp-cp2-pp2", tp=2, sp=True, cp=2, pp=2, multiple=4, **DEALT),
    *DEALT_EIGHT,
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return run_cases(1, ONE_RANK, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory) -> dict:
    return run_cases(8, EIGHT_RANKS, tmp_path_factory.mktemp("eight"), timeout_s=1200)


@pytest.mark.parametrize("one", EIGHT_RANKS, ids=names(EIGHT_RANKS))
def test_sparse_step_equals_masked_dense_step_and_keeps_the_same_positions(one_rank, eight_ranks, one):
    name = one["name"]
    alone = (one_rank | eight_ranks)[one.get("like", name.split("@")[0]) or name]
    assert_exact(eight_ranks[name])
    assert_keeps_the_same(alone, eight_ranks[name], 18 if "packed" in name else 8)


@pytest.mark.parametrize("name", names(DEALT_EIGHT))
def test_dealt_rows_move_and_none_is_lost_or_used_twice(one_rank, eight_ranks, name):
    found = eight_ranks[name]
    assert found["moved"] > 0 and found["samples"] == one_rank[name.split("@")[0]]["samples"]
