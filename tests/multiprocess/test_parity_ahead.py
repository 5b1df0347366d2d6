"""The claim of test_parity for models that predict more than the next token.

A depth reads the token of its true place, predicts the label of its true place, and has a loss where the position it
stands at is kept and the batch has a loss there. What Megatron logs of it is compared as well.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, parameters
from tests.multiprocess.test_parity_models import AUX, BIAS, MLA, MOE


def _ahead(name: str, depths: int = 1, **options) -> dict:
    return case(name, config={"mtp_num_layers": depths, **options.pop("config", {})}, **options)


ONE_RANK = [
    *(_ahead(f"mtp{depths}-n{n}", depths, dense_layers=n) for depths in (1, 2) for n in (0, 1)),
    _ahead("mtp2-even", 2, multiple=2),
    _ahead("mtp2-mean-per-sample", 2, per_token_loss=False, budget="per-sample"),
    _ahead("mtp2-one-layer-uniform", 2, recompute="uniform", config={"mtp_use_repeated_layer": True}),
    _ahead("mtp2-dealt", 2, budget="dealt", rows=1),
    _ahead("mtp2-maskless", 2, set={"tells_no_loss_mask": True}),  # as Megatron-Bridge's gpt_step calls the model
    _ahead("mtp1-read-tied", context="read", budget="per-sample", tied=True),
    _ahead("mtp1-last1-learned-positions", dense_last=1, positions="learned_absolute"),
    _ahead("mtp2-packed", 2, packed=True),
    _ahead("mtp2-mla", 2, mla=True, config={**MLA, "rope_type": "yarn"}),
    _ahead("mtp2-moe-aux", 2, config={**MOE, **AUX}, aux=True, multiple=5),
    _ahead("mtp1-moe-bias", config={**MOE, **BIAS}, multiple=5),
]
FOUR_RANKS = [
    _ahead("mtp2-even@tp2-sp-pp2", 2, tp=2, sp=True, pp=2, multiple=2),
    _ahead("mtp2-n1@tp2-dp2", 2, tp=2),
    _ahead("mtp1-n0@pp2-dp2", pp=2, dense_layers=0),
    _ahead("mtp1-n1@pp2-vpp2-dp2", pp=2, vpp=2),
    _ahead("mtp2-dealt@tp2-dp2", 2, tp=2, budget="dealt", rows=1, uneven=True),
    _ahead("mtp2-n1@Et|t|tt|mmL", 2, pp=4, config={"pipeline_model_parallel_layout": "Et|t|tt|mmL"}),
]
one_rank = launched(1, ONE_RANK)
four_ranks = launched(4, FOUR_RANKS)


@pytest.mark.parametrize("name", parameters(ONE_RANK))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", parameters(FOUR_RANKS))
def test_sparse_step_equals_masked_dense_step_in_layout(four_ranks, name):
    assert_exact(four_ranks[name])


@pytest.mark.parametrize("name", parameters(FOUR_RANKS))
def test_layout_keeps_the_same_positions(one_rank, four_ranks, name):
    assert_keeps_the_same(one_rank[name.split("@")[0]], four_ranks[name], 8)
