"""Rows dealt to ranks by their short length: test_parity's claims, and no row is lost, runs twice or weighs otherwise.

Every sample keeps what it keeps on one rank under ``per-sample``. Real Megatron models, fp32.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, names, run_cases
from tests.multiprocess.test_parity import OVERLAP
from tests.multiprocess.test_parity_lengths import GATHERED, PACKED, SENT

OWN = {"rows": 1, "budget": "per-sample"}
ONE_ROW = {"rows": 1, "uneven": True}
# its pictures are in an object, as Megatron-Bridge has them
QWEN = {"model": "qwen", "visual_keep": 0.25, "visual_score": "static", "config": {"mrope_section": [2, 1, 1]}}
LEARNED = QWEN | {"visual_score": "gradient"}
TILES = {"model": "llava", "tiles": [1, 3, 3, 1], "side": 16, "visual_keep": 0.25, "visual_score": "static"}
# its pictures are in dictionaries
MIMO = {"model": "mimo", "side": 24, "visual_keep": 0.25, "visual_score": "detail"}
MEANS = {"per_token_loss": False, "ddp": True, "uneven": True}
BATCH = {"share": "batch"}
ONE_RANK = [
    case("gpt", **OWN),
    case("gpt-share", **OWN, **BATCH),
    case("gpt-rows2", budget="per-sample"),
    case("moe", **OWN, **SENT),
    case("llava", model="llava", **OWN),
    case("qwen", **OWN, **QWEN),
    case("tiles", **OWN, **TILES),
    case("mimo", **OWN, **MIMO),
    case("qwen-share", **OWN, **LEARNED, **BATCH),
    case("packed", budget="per-sample", **PACKED),
    case("packed-share", budget="per-sample", **PACKED, **BATCH),
]
FOUR_RANKS = [
    case("gpt@dp4", budget="dealt", **ONE_ROW),
    case("gpt-rows2@dp4", budget="dealt"),
    case("gpt@tp2-dp2", budget="dealt", tp=2, **ONE_ROW),
    case("gpt@pp2-dp2", budget="dealt", pp=2, ddp=True, **ONE_ROW),
    case("gpt@pp2-vpp2-dp2", budget="dealt", pp=2, vpp=2, ddp=True, **ONE_ROW, **OVERLAP),
    case("gpt@cp2-dp2", budget="dealt", cp=2, multiple=4, **ONE_ROW),
    case("moe@ep2-dp4", budget="dealt", ep=2, **ONE_ROW, **SENT),
    case("moe@ep2-pp2-dp2", budget="dealt", ep=2, pp=2, recompute="uniform", **ONE_ROW, **SENT),
    case("moe@ep4", budget="dealt", ep=4, **ONE_ROW, **GATHERED),
    case("moe@ep2-pp2-dp2-gathered", budget="dealt", ep=2, pp=2, ddp=True, **ONE_ROW, **GATHERED),
    case("llava@dp4", model="llava", budget="dealt", **ONE_ROW),
    case("llava@pp2-dp2", model="llava", budget="dealt", pp=2, **ONE_ROW),
    case("qwen@dp4", budget="dealt", **ONE_ROW, **QWEN),
    case("tiles@dp4", budget="dealt", **ONE_ROW, **TILES),
    case("tiles@pp2-dp2", budget="dealt", pp=2, **ONE_ROW, **TILES),
    case("mimo@dp4", budget="dealt", **ONE_ROW, **MIMO),
    case("packed@dp4", budget="dealt", uneven=True, **PACKED),
    case("gpt-share@dp4", budget="dealt", **ONE_ROW, **BATCH),
    case("gpt-share@tp2-dp2", budget="dealt", tp=2, **ONE_ROW, **BATCH),
    case("qwen-share@dp4", budget="dealt", **ONE_ROW, **LEARNED, **BATCH),
    case("packed-share@dp4", budget="dealt", uneven=True, **PACKED, **BATCH),
]
# gradients beside those of rows at home, each microbatch with a mean of its own
WEIGHED = [
    case("means-home@dp4", rows=1, budget="per-sample", **MEANS),
    case("means-dealt@dp4", rows=1, budget="dealt", **MEANS),
    case("means-rows2-home@tp2-dp2", tp=2, budget="per-sample", **MEANS),
    case("means-rows2-dealt@tp2-dp2", tp=2, budget="dealt", **MEANS),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    one_rank = run_cases(1, ONE_RANK, tmp_path_factory.mktemp("one"))
    return one_rank | run_cases(4, [*FOUR_RANKS, *WEIGHED], tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", names([*FOUR_RANKS, *WEIGHED]))
def test_sparse_step_equals_masked_dense_step_of_the_rows_dealt(results, name):
    assert_exact(results[name])


@pytest.mark.parametrize("name", names(FOUR_RANKS))
def test_every_sample_keeps_what_it_keeps_on_one_rank(results, name):
    """And runs as often: no row is lost, none is used twice."""
    alone = results[name.partition("@")[0]]
    assert results[name]["samples"] == alone["samples"]
    assert_keeps_the_same(alone, results[name], len(alone["kept"]))


@pytest.mark.parametrize("name", [one for one in names(FOUR_RANKS) if one != "gpt-rows2@dp4"])
def test_rows_move_and_ranks_are_as_even_as_they_can_be(results, name):
    found = results[name]
    assert found["moved"] > 0
    assert sum(found["positions"]) == sum(map(sum, found["lengths"]))
    if "gathered" not in name and name != "moe@ep4":  # there all run the longest of each column
        assert 1 <= found["at_best"] <= max(found["positions"]) * len(found["positions"]) / sum(found["positions"])
    spread = max(found["positions"]) - min(found["positions"])
    assert spread <= max(map(max, found["lengths"])) / 2


@pytest.mark.parametrize("name", ["moe@ep4", "moe@ep2-pp2-dp2-gathered"])
def test_microbatches_are_as_long_on_every_rank_where_experts_take_equally_many_of_each(results, name):
    lengths = results[name]["lengths"]
    assert len({tuple(own) for own in lengths}) == 1 and len(set(lengths[0])) > 1


@pytest.mark.parametrize("name", ["gpt", "packed"])
def test_a_share_of_the_batch_goes_to_other_rows(results, name):
    each, batch = ({key: len(row[0]) for key, row in results[one]["kept"].items()} for one in (name, f"{name}-share"))
    changes = [batch[key] - each[key] for key in each]
    assert min(changes) < 0 < max(changes)
    assert -len(each) <= sum(changes) <= 0  # each sample's share is rounded up, the batch's but once


def test_one_microbatch_each_leaves_nothing_to_deal(results):
    assert results["gpt-rows2@dp4"]["moved"] == 0


@pytest.mark.parametrize(
    ("home", "dealt"),
    [("means-home@dp4", "means-dealt@dp4"), ("means-rows2-home@tp2-dp2", "means-rows2-dealt@tp2-dp2")],
)
def test_rows_weigh_what_they_weigh_at_home(results, home, dealt):
    assert results[dealt]["moved"] > 0
    there, here = results[home]["gradient_sizes"], results[dealt]["gradient_sizes"]
    assert there.keys() == here.keys()
    for name, size in there.items():
        assert here[name] == pytest.approx(size, rel=1e-4, abs=1e-5)
