"""A sparse step is the masked full-length step, and every layout picks the same tokens. Real Megatron models, fp32.

The batch holds a row without targets, one of targets only, one with a single target, and padded ones.
"""

from __future__ import annotations

import pytest

from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, case, launched, parameters


def _grid(layout: str, recomputes: tuple, **options) -> list[dict]:
    return [
        case(f"{model}-n{n}-{method or 'plain'}{layout}", model=model, dense_layers=n, recompute=method, **options)
        for model in ("gpt", "llava")
        for n in (0, 1)
        for method in recomputes
    ]


# Four microbatches per replica. With batched sends Megatron mixes them up between two stages: its own arguments want
# overlap. Before core 0.19 outputs were freed while gloo still sent them.
OVERLAP = {"config": {"overlap_p2p_comm": True, "batch_p2p_comm": False}, "set": {"deallocate_pipeline_outputs": False}}
# Stages by a layout: the first one alone has the embedding, the last one the loss and, as in DeepSeek-V3, no layer.
STAGES = {
    "gpt-n1-plain@Et|t|tt|L": {"pp": 4, "config": {"pipeline_model_parallel_layout": "Et|t|tt|L"}},
    "gpt-n0-plain@E|tt|tt|L": {
        "pp": 4,
        "dense_layers": 0,
        "config": {"pipeline_model_parallel_layout": "E|tt|tt|L"},
    },
    "gpt-n1-plain@Etttt|L": {"pp": 2, "config": {"pipeline_model_parallel_layout": "Etttt|L"}},
    "gpt-n2-block@Ettt|tL": {
        "pp": 2,
        "dense_layers": 2,
        "recompute": "block",
        "config": {"pipeline_model_parallel_layout": "Ettt|tL"},
    },
}
LAST = {"": {}, "-uniform": {"recompute": "uniform"}, "-even": {"multiple": 2}, "-by4": {"multiple": 4}}
ONE_RANK = [
    *_grid("", (None, "uniform", "block")),
    case("gpt-n2-block", dense_layers=2, recompute="block"),
    case("llava-n2-plain", model="llava", dense_layers=2),
    case("gpt-n1-learned-positions", positions="learned_absolute"),
    case("gpt-n1-student", score="student"),
    case("llava-n1-pad", model="llava", visual="pad"),
    case("gpt-n1-per-sample", budget="per-sample"),
    case("llava-n1-per-sample", model="llava", budget="per-sample"),
    case("gpt-n1-share-per-sample", budget="per-sample", share="batch"),
    case("gpt-n1-balanced", budget="balanced"),
    case("llava-n1-balanced", model="llava", budget="balanced"),
    case("gpt-n1-mean-balanced", budget="balanced", per_token_loss=False),
    case("gpt-n1-read", context="read"),
    case("llava-n0-read", model="llava", context="read", dense_layers=0),
    case("gpt-n1-read-per-sample", context="read", budget="per-sample"),
    case("gpt-n1-even", multiple=2),
    case("gpt-n1-rows1", rows=1),
    case("llava-n1-even", model="llava", multiple=2),
    *(case(f"{m}-n{n}-by4", model=m, multiple=4, dense_layers=n) for m in ("gpt", "llava") for n in (0, 1)),
    case("gpt-n1-by8", multiple=8),
    case("packed-n1", packed=True),
    case("packed-n0", packed=True, dense_layers=0),
    case("packed-n1-rows1", packed=True, rows=1),
    case("packed-n1-read-per-sample", packed=True, rows=1, context="read", budget="per-sample"),
    *(case(f"{m}-n1-unlabelled", model=m, unlabelled=True) for m in ("gpt", "llava")),
    case("packed-n0-unlabelled-student", packed=True, unlabelled=True, dense_layers=0, score="student"),
    case("gpt-n1-tied-grouped", tied=True, groups=2),
    case("llava-n1-learned-positions", model="llava", positions="learned_absolute"),
    *(case(f"{m}-n1-last1{way}", model=m, dense_last=1, **own) for m in ("gpt", "llava") for way, own in LAST.items()),
    case("gpt-n0-last2-block", dense_layers=0, dense_last=2, recompute="block"),
    case("packed-n1-last1", packed=True, dense_last=1),
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
    case("gpt-n1-share-per-sample@tp2-dp2", tp=2, budget="per-sample", share="batch"),
    case("gpt-n1-balanced@tp2-dp2", tp=2, budget="balanced"),
    case("gpt-n1-balanced@dp4", budget="balanced"),
    case("llava-n1-balanced@dp4", model="llava", budget="balanced"),
    case("gpt-n1-read@dp4", context="read"),
    case("gpt-n1-read-per-sample@tp2-dp2", tp=2, context="read", budget="per-sample"),
    case("gpt-n1-even@tp2-sp-pp2", tp=2, pp=2, sp=True, multiple=2),
    *(case(name, **own) for name, own in STAGES.items()),
    case("llava-n1-unlabelled@tp2-pp2", model="llava", unlabelled=True, tp=2, pp=2),
    case("gpt-n1-unlabelled@tp2-dp2", unlabelled=True, tp=2),
    case("gpt-n1-tied-grouped@tp2-pp2", tp=2, pp=2, tied=True, groups=2),
    case("gpt-n1-plain@pp2-vpp2-dp2", pp=2, vpp=2),
    case("gpt-n1-rows1@pp2-vpp2-dp2", pp=2, vpp=2, rows=1, **OVERLAP),
    *(case(f"{m}-n1-by4@cp2-dp2", model=m, cp=2, multiple=4) for m in ("gpt", "llava")),
    *(
        case(f"{m}-n1-by4@tp2-sp-cp2", model=m, tp=2, sp=True, cp=2, multiple=4, recompute="uniform")
        for m in ("gpt", "llava")
    ),
    *(case(f"{m}-n0-by4@cp2-pp2", model=m, cp=2, pp=2, multiple=4, dense_layers=0) for m in ("gpt", "llava")),
    case("gpt-n1-by8@cp4", cp=4, multiple=8),
    case("packed-n1@cp2-dp2", packed=True, cp=2),
    case("packed-n0@tp2-sp-cp2", packed=True, cp=2, tp=2, sp=True, dense_layers=0),
    case("packed-n1-rows1@tp2-pp2", packed=True, tp=2, pp=2, rows=1, recompute="uniform"),
    case("packed-n1-rows1@cp2-pp2", packed=True, cp=2, pp=2, rows=1),
    case("llava-n1-even@tp2-sp-dp2", model="llava", tp=2, sp=True, multiple=2),
    case("llava-n1-even@tp2-sp-pp2", model="llava", tp=2, sp=True, pp=2, multiple=2),
    *(case(f"{m}-n1-last1@tp2-dp2", model=m, tp=2, dense_last=1) for m in ("gpt", "llava")),
    *(
        case(f"{m}-n1-last1-even@tp2-sp-dp2", model=m, tp=2, sp=True, multiple=2, dense_last=1)
        for m in ("gpt", "llava")
    ),
    case("gpt-n1-last1-by4@cp2-dp2", cp=2, multiple=4, dense_last=1, recompute="uniform"),
    case("llava-n1-last1-by4@tp2-sp-cp2", model="llava", tp=2, sp=True, cp=2, multiple=4, dense_last=1),
    case("packed-n1-last1@tp2-sp-cp2", packed=True, cp=2, tp=2, sp=True, dense_last=1),
]
# `make test` keeps every layout, and in each the model, dense layers and recompute that others there do not have.
FULL = {
    *("gpt-n0-plain@tp2-pp2", "gpt-n1-uniform@tp2-pp2", "llava-n0-uniform@tp2-pp2", "llava-n1-plain@tp2-pp2"),
    *("gpt-n1-plain@tp2-dp2", "llava-n1-plain@pp2-dp2", "llava-n1-plain@dp4", "gpt-n1-balanced@dp4"),
    *("gpt-n1-by4@cp2-dp2", "llava-n1-by4@tp2-sp-cp2", "gpt-n0-by4@cp2-pp2", "llava-n1-even@tp2-sp-dp2"),
    *("llava-n1-last1@tp2-dp2", "gpt-n1-last1-even@tp2-sp-dp2", "gpt-n1-plain@pp2-vpp2-dp2"),
    *("gpt-n1-block", "llava-n0-uniform", "llava-n1-block", "gpt-n0-uniform", "llava-n0-by4", "gpt-n1-last1-even"),
    *("llava-n1-last1-uniform", "llava-n1-last1-by4"),
}
READ = ("gpt-n1-per-sample", "gpt-n1-read-per-sample")
one_rank = launched(1, ONE_RANK, *READ)
four_ranks = launched(4, FOUR_RANKS)


@pytest.mark.parametrize("name", parameters(ONE_RANK, FULL))
def test_sparse_step_equals_masked_dense_step(one_rank, name):
    assert_exact(one_rank[name])


@pytest.mark.parametrize("name", parameters(FOUR_RANKS, FULL))
def test_sparse_step_equals_masked_dense_step_in_layout(four_ranks, name):
    assert_exact(four_ranks[name])


@pytest.mark.parametrize("name", parameters([one for one in FOUR_RANKS if one.get("budget") == "balanced"], FULL))
def test_balanced_ranks_run_the_same_number_of_positions(four_ranks, name):
    positions = four_ranks[name]["positions"]
    assert len(positions) == (2 if "dp2" in name else 4)
    assert max(positions) * len(positions) <= 1.02 * sum(positions)


def test_context_that_nothing_reads_can_be_left_out(one_rank):
    """The batch has a row without targets, which then keeps nothing, and rows that go on after their last target."""
    every, read = ({key: set(row[0]) for key, row in one_rank[name]["kept"].items()} for name in READ)
    assert all(read[key] <= every[key] for key in every)
    left_out = [len(every[key] - read[key]) for key in every if read[key]]
    assert max(left_out) > 0 and sum(not kept for kept in read.values()) == 1


@pytest.mark.parametrize("name", parameters([one for one in FOUR_RANKS if one.get("budget") != "balanced"], FULL))
def test_layout_keeps_the_same_positions(one_rank, four_ranks, name):
    alone, here = one_rank[name.split("@")[0]], four_ranks[name]
    assert_keeps_the_same(alone, here, 18 if "packed" in name else 8)
    for key, (_, _, length) in alone["kept"].items():
        # Lengths of other rows, or fill for CP in each segment, may come on top.
        more = "per-sample" in name or (name.startswith("packed") and "cp2" in name)
        assert here["kept"][key][2] == length or more
