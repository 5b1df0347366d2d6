"""The claim of test_parity where visual positions are left out, by themselves and beside targets.

The oracle is that of all cases: what a plan leaves out is hidden from every later layer, whatever it was. Pictures have
sixteen positions, of which a quarter is asked for.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, names


def _visual(name: str, **options) -> dict:
    return case(name, **{"model": "llava", "side": 32, "keep_ratio": 1.0, "visual_keep": 0.25, **options})


def _both(name: str, **options) -> dict:
    return _visual(name, **{"keep_ratio": 0.5, **options})


def _tiles(name: str, **options) -> dict:
    """Pictures of one tile and of three; of every other row the tiles are the frames of a clip."""
    return _both(name, **{"tiles": [1, 3, 3, 1], "side": 16, "visual_score": "static", **options})


def _qwen(name: str, **options) -> dict:
    """A clip of three frames and a picture in every row, with mRoPE; a visual position carries a loss."""
    settings = {"model": "qwen", "visual_keep": 0.25, "visual_score": "static", "config": {"mrope_section": [2, 1, 1]}}
    return case(name, **{**settings, **options})


INTERLEAVED = {  # overlapped, as Megatron asks of two stages
    "config": {"mrope_section": [2, 1, 1], "overlap_p2p_comm": True, "batch_p2p_comm": False},
    "set": {"deallocate_pipeline_outputs": False},
    "pp": 2,
    "vpp": 2,
}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
ONE_RANK = [
    *(_visual(f"visual-n{n}{by}", dense_layers=n, multiple=m) for n in (0, 1) for by, m in (("", 1), ("-by4", 4))),
    *(_both(f"both-n{n}{by}", dense_layers=n, multiple=m) for n in (0, 1) for by, m in (("", 1), ("-by4", 4))),
    *(_both(f"both-{budget}", budget=budget) for budget in ("balanced", "per-sample")),
    *(_visual(f"visual-{score}", visual_score=score) for score in ("even", "static", "detail", "gradient")),
    _visual("visual-gradient-by4", visual_score="gradient", multiple=4),
    _qwen("qwen-gradient", visual_score="gradient"),
    _visual("visual-read-per-sample", context="read", budget="per-sample"),
    _both("both-n1-uniform", recompute="uniform"),
    _both("both-last1", dense_last=1),
    _both("both-learned-positions", positions="learned_absolute"),
    _both("both-moe", config=MOE),
    _both("both-moe-gradient", config=MOE, visual_score="gradient"),
    *(_tiles(f"tiles-n{n}", dense_layers=n) for n in (0, 1)),
    _tiles("tiles-n1-by4", multiple=4),
    *(_qwen(f"qwen-n{n}", dense_layers=n) for n in (0, 1)),
    _qwen("qwen-alone", keep_ratio=1.0),
    _qwen("qwen-read-per-sample", context="read", budget="per-sample", recompute="uniform"),
]
TWO_RANKS = [
    *(_visual(f"visual-n{n}-by4@{name}", dense_layers=n, multiple=4, **layout)
      for n in (0, 1)
      for name, layout in {"tp2-sp": {"tp": 2, "sp": True}, "cp2": {"cp": 2}}.items()),
    *(_both(f"both-n{n}-by4@{name}", dense_layers=n, multiple=4, **layout)
      for n in (0, 1)
      for name, layout in {"tp2-sp": {"tp": 2, "sp": True}, "cp2": {"cp": 2}}.items()),
    *(_visual(f"visual-n{n}@{name}", dense_layers=n, **layout)
      for n in (0, 1)
      for name, layout in {"pp2": {"pp": 2}, "dp2": {}}.items()),
    *(_both(f"both-n{n}@{name}", dense_layers=n, **layout)
      for n in (0, 1)
      for name, layout in {"pp2": {"pp": 2}, "dp2": {}}.items()),
    _both("both-balanced@dp2", budget="balanced"),
    _visual("visual-even@tp2", visual_score="even", tp=2),
    *(_visual(f"visual-gradient-by4@{name}", visual_score="gradient", multiple=4, **layout)
      for name, layout in {"tp2": {"tp": 2}, "tp2-sp": {"tp": 2, "sp": True}, "cp2": {"cp": 2}, "pp2": {"pp": 2},
                           "dp2": {}}.items()),
    _qwen("qwen-gradient@pp2", visual_score="gradient", pp=2),
    _qwen("qwen-gradient@pp2-vpp2", visual_score="gradient", **INTERLEAVED),
    _both("both-moe-gradient@ep2", config=MOE, visual_score="gradient", ep=2),
    _both("both-moe@ep2", config=MOE, ep=2),
    *(_tiles(f"tiles-n1@{name}", **layout) for name, layout in {"pp2": {"pp": 2}, "dp2": {}}.items()),
    _tiles("tiles-n1-by4@tp2-sp", multiple=4, tp=2, sp=True),
    *(_qwen(f"qwen-n{n}@tp2", dense_layers=n, tp=2) for n in (0, 1)),
    _qwen("qwen-n1@pp2", pp=2),
    _qwen("qwen-alone@dp2", keep_ratio=1.0),
]  # fmt: skip
one_rank = launched(1, ONE_RANK, "visual-read-per-sample")
two_ranks = launched(2, TWO_RANKS, "both-balanced@dp2")


@pytest.mark.parametrize("name", names(ONE_RANK))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_sparse_step_equals_masked_dense_step_in_layout(two_ranks, name):
    assert_exact(two_ranks[name])


@pytest.mark.parametrize("name", [case["name"] for case in TWO_RANKS if case.get("budget") != "balanced"])
def test_layout_keeps_the_same_positions(one_rank, two_ranks, name):
    assert_keeps_the_same(one_rank[name.split("@")[0]], two_ranks[name], 8)


def test_balanced_ranks_run_the_same_number_of_positions(two_ranks):
    positions = two_ranks["both-balanced@dp2"]["positions"]
    assert len(positions) == 2 and max(positions) * 2 <= 1.02 * sum(positions)


def test_rows_keep_a_quarter_of_their_picture_and_all_their_targets_where_only_pictures_are_cut(one_rank):
    """Under ``per-sample`` a row runs what it asks for: of sixteen visual positions four."""
    lengths = [len(kept) for kept, _, _ in one_rank["visual-read-per-sample"]["kept"].values()]
    assert min(lengths) == 0, "the row without targets runs nothing"
    assert max(lengths) == 23 + 4
