"""The claim of test_parity for pictures as they come: dynamic resolution, clips, text alone, cut and packed rows."""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, names

pytest.importorskip("megatron.core")
pytest.importorskip("einops", reason="RADIO, the tower of dynamic resolution, needs einops")


def _sized(name: str, longest: int = 56, shuffles: bool = False, **options) -> dict:
    """Rows of up to 46 positions, of which 24 are visual."""
    own = {"model": "llava", "longest": longest, "dynamic": {"shuffles": shuffles}, "budget": "per-sample"}
    return case(name, **own | {"visual_keep": 0.5, "visual_score": "detail"} | options)


def _tubelets(name: str, **options) -> dict:
    """Two frames are one picture to the tower; one of three is alone with itself."""
    own = {"model": "llava", "longest": 72, "dynamic": {"frames": 2}, "budget": "per-sample"}
    return case(name, **own | {"visual_keep": 0.5, "visual_score": "static"} | options)


def _packed(name: str, **options) -> dict:
    return case(name, **{"model": "llava", "packed": True, "rows": 1, "budget": "per-sample"} | options)


ONE_RANK = [
    _sized("sized-targets", visual_keep=1.0),
    *(_sized(f"sized-n{n}", dense_layers=n) for n in (0, 1)),
    _sized("sized-pad-uniform", visual="pad", recompute="uniform"),
    _sized("sized-static-uniform", visual_score="static", budget="uniform"),
    _sized("sized-cut", longest=30),
    _sized("sized-shuffled", shuffles=True),
    _sized("sized-by4", multiple=4),
    *(_sized(f"sized-one-row{how}", shuffles=bool(how), rows=1) for how in ("", "-shuffled")),
    _tubelets("tubelets"),
    _tubelets("tubelets-shuffled", dynamic={"frames": 2, "shuffles": True}),
    _packed("packed"),
    _packed("packed-n0-visual", dense_layers=0, visual_keep=0.5, visual_score="even"),
]
TWO_RANKS = [
    _sized("sized-n1@tp2", tp=2),
    _sized("sized-n1@dp2"),
    _sized("sized-by4@tp2-sp", tp=2, sp=True, multiple=4),
    _sized("sized-by4@cp2", cp=2, multiple=4),
    _sized("sized-shuffled@dp2", shuffles=True),
    _tubelets("tubelets@pp2", pp=2),
    _tubelets("tubelets@tp2", tp=2),
    _packed("packed@pp2", pp=2),
    _packed("packed-n0-visual@dp2", dense_layers=0, visual_keep=0.5, visual_score="even"),
]


one_rank = launched(1, ONE_RANK)
two_ranks = launched(2, TWO_RANKS)


@pytest.mark.parametrize("name", names(ONE_RANK))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_sparse_step_equals_masked_dense_step_in_layout(two_ranks, name):
    assert_exact(two_ranks[name])


@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_layout_keeps_the_same_positions(one_rank, two_ranks, name):
    num_samples = 18 if "packed" in name else 8
    assert_keeps_the_same(one_rank[name.split("@")[0]], two_ranks[name], num_samples)
