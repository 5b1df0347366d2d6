"""Lengths are free to differ between microbatches and replicas: test_parity's claims with pipeline stages and experts.

``per-sample`` keeps the same positions in every layout. ``balanced`` shares out by replica, so its layouts are held
against the plain data-parallel one of as many replicas and the same alignment. Real Megatron models, fp32.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, names, run_cases
from tests.multiprocess.test_parity import OVERLAP
from tests.multiprocess.test_parity_models import AUX, MOE

BUDGETS = ("balanced", "per-sample")
SENT = {"config": {**MOE, "moe_token_dispatcher_type": "alltoall"}}
GATHERED = {"config": {**MOE, "moe_token_dispatcher_type": "allgather"}}
RAGGED = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}  # Megatron wants both, experts or not
COUNTED = {"config": {**SENT["config"], **AUX}, "aux": True}


def each_budget(name: str, like: str | None = None, **options) -> list[dict]:
    """The case with each budget; ``like`` is the layout, of as many replicas, that ``balanced`` is held against."""
    model, _, layout = name.partition("@")
    return [
        case(f"{model}-{b}@{layout}", budget=b, like=f"{model}-{b}@{like}" if like else None, **options)
        for b in BUDGETS
    ]


PACKED = {"packed": True, "rows": 1}
ONE_RANK = [
    *each_budget("gpt@dp1"),
    *each_budget("llava-by2@dp1", model="llava", multiple=2),
    *each_budget("packed-by4@dp1", multiple=4, **PACKED),
    *each_budget("gpt-by4@dp1", multiple=4),
]
FOUR_RANKS = [
    # what the others are held against
    *each_budget("gpt@tp2-dp2", tp=2),
    *each_budget("gpt-rows1@tp2-dp2", tp=2, rows=1),
    *each_budget("llava@tp2-dp2", model="llava", tp=2),
    *each_budget("moe-rows1@dp4", rows=1, **SENT),
    # ... experts shared within a replica, by allgather
    *each_budget("moe-by2@tp2-sp-dp2", rows=1, tp=2, sp=True, etp=1, ep=2, multiple=2, forgets=True, **GATHERED),
    *each_budget("gpt-ragged@tp2-dp2", tp=2, ragged=True),
    # stages
    *each_budget("gpt@pp2-dp2", "tp2-dp2", pp=2, ddp=True),
    *each_budget("gpt-ragged@pp2-dp2", "tp2-dp2", pp=2, ragged=True, config=RAGGED),
    *each_budget("gpt@pp4", "dp1", communicator=True, pp=4, recompute="uniform"),
    *each_budget("llava@pp2-dp2", "tp2-dp2", model="llava", pp=2, recompute="uniform"),
    *each_budget("llava-by2@tp2-sp-pp2", "dp1", model="llava", tp=2, sp=True, pp=2, multiple=2),
    *each_budget("gpt-by4@cp2-pp2", "dp1", cp=2, pp=2, multiple=4),
    *each_budget("packed-by4@tp2-pp2", "dp1", tp=2, pp=2, multiple=4, recompute="uniform", **PACKED),
    *each_budget("packed-by4@cp2-pp2", "dp1", cp=2, pp=2, multiple=4, **PACKED),
    # stages of several chunks
    *each_budget("gpt@pp2-vpp2-dp2", "tp2-dp2", pp=2, vpp=2),
    *each_budget("gpt-rows1@pp2-vpp2-dp2", "tp2-dp2", pp=2, vpp=2, rows=1, ddp=True, **OVERLAP),
    # experts of several replicas
    *each_budget("moe-rows1@ep4", "dp4", rows=1, ep=4, ddp=True, **SENT),
    *each_budget("moe-rows1@etp2-dp4", "dp4", rows=1, etp=2, **SENT),
    *each_budget("moe-rows1@ep2-etp2-dp4", "dp4", rows=1, ep=2, etp=2, recompute="uniform", **SENT),
    *each_budget("moe-counted@ep2-dp4", ep=2, forgets=True, **COUNTED),
    *each_budget("moe-by2@ep2-pp2-dp2", "tp2-sp-dp2", rows=1, ep=2, pp=2, multiple=2, recompute="uniform", **SENT),
]


HELD = [one for one in FOUR_RANKS if one["like"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    one_rank = run_cases(1, ONE_RANK, tmp_path_factory.mktemp("one"))
    return one_rank | run_cases(4, FOUR_RANKS, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", names([*ONE_RANK, *FOUR_RANKS]))
def test_sparse_step_equals_masked_dense_step(results, name):
    assert_exact(results[name])


@pytest.mark.parametrize("one", HELD, ids=names(HELD))
def test_layout_keeps_the_same_positions(results, one):
    assert_keeps_the_same(results[one["like"]], results[one["name"]], 18 if one.get("packed") else 8)


@pytest.mark.parametrize("one", HELD, ids=names(HELD))
def test_lengths_differ_where_one_length_was_needed(results, one):
    """Between the microbatches of a pipeline; between the replicas that share experts in one microbatch."""
    lengths = results[one["name"]]["lengths"]
    if one["pp"] > 1:
        assert any(len(set(own)) > 1 for own in lengths)
    if one.get("ep", 1) * (one.get("etp") or 1) > 1:
        assert any(len(set(together)) > 1 for together in zip(*lengths, strict=True))
