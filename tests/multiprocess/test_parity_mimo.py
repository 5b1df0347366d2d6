"""The claim of test_parity for MIMO, as its LLaVA example is built: a tower, its projection, a GPTModel, on every rank.

Pictures have nine positions, written out in the row. Rows that are packed are laid end to end, a sample each.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, names


def _mimo(name: str, **options) -> dict:
    return case(name, **{"model": "mimo", "side": 24, "multiple": 4, **options})


VISUAL = {"visual_keep": 0.25, "visual_score": "static"}
ONE_RANK = [
    *(_mimo(f"targets-n{n}", dense_layers=n) for n in (0, 1, 3)),
    *(_mimo(f"visual-n{n}", dense_layers=n, **VISUAL) for n in (0, 1, 3)),
    _mimo("packed", packed=True, budget="per-sample"),
    _mimo("packed-visual", packed=True, budget="per-sample", **VISUAL),
    _mimo("each", budget="per-sample", multiple=1),
    _mimo("each-visual", budget="per-sample", multiple=1, **VISUAL),
]
TWO_RANKS = [
    *(_mimo(f"{name}@{layout}", **settings, **sizes)
      for name, settings in {"targets-n1": {}, "visual-n1": VISUAL}.items()
      for layout, sizes in {"tp2": {"tp": 2}, "tp2-sp": {"tp": 2, "sp": True}, "cp2": {"cp": 2}, "dp2": {}}.items()),
    *(_mimo(f"{name}@{layout}", packed=True, budget="per-sample", **settings, **sizes)
      for name, settings in {"packed": {}, "packed-visual": VISUAL}.items()
      for layout, sizes in {"tp2-sp": {"tp": 2, "sp": True}, "cp2": {"cp": 2}}.items()),
]  # fmt: skip
one_rank = launched(1, ONE_RANK, "packed", "each", "packed-visual", "each-visual")
two_ranks = launched(2, TWO_RANKS)


@pytest.mark.parametrize("name", names(ONE_RANK))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_layout_keeps_the_positions_of_one_rank_and_is_exact(one_rank, two_ranks, name):
    assert_exact(two_ranks[name])
    assert_keeps_the_same(one_rank[name.split("@")[0]], two_ranks[name], 8)


@pytest.mark.parametrize("kind", ["", "-visual"])
def test_packed_rows_keep_what_rows_of_their_own_keep(one_rank, kind):
    assert_keeps_the_same(one_rank[f"each{kind}"], one_rank[f"packed{kind}"], 8)
