"""Megatron-Bridge's official Qwen-VL recipes, shrunk, train through its own ``finetune`` with our callback alone.

They pack: Qwen2.5-VL in the collator, Qwen3-VL in the step. CPU and gloo, Megatron's own layers.
"""

import pytest

from tests.frameworks.conftest import missing

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]

RECIPES = ("qwen25 sft", "qwen25 peft", "qwen3 sft", "qwen3 peft")
SPARSE = ("regate", "student", "visual")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_as_shipped_where_it_matters(recipes, recipe):
    seen = recipes[f"{recipe} plain"]
    assert seen["packs"] and seen["micro_batch_size"] == 2 and seen["peft"] == recipe.endswith("peft")


@pytest.mark.parametrize("recipe", RECIPES)
def test_keep_ratio_1_trains_bit_for_bit_as_without(recipes, recipe):
    assert recipes[f"{recipe} all kept"]["losses"] == recipes[f"{recipe} plain"]["losses"]


@pytest.mark.parametrize("how", SPARSE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_sparse_steps_run_shorter(recipes, recipe, how):
    seen, plain = recipes[f"{recipe} {how}"], recipes[f"{recipe} plain"]
    totals = seen["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (4, 2, 0)
    assert totals["positions_run"] < totals["positions_dense"] and totals["targets_kept"] < totals["targets_total"]
    assert seen["losses"][:2] == plain["losses"][:2] and seen["losses"][2:] != plain["losses"][2:]
    assert (totals["visual_kept"] < totals["visual_total"]) == (how == "visual")


@pytest.mark.parametrize("recipe", ["qwen25 peft", "qwen3 peft"])
def test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint(recipes, recipe):
    """By then the adapters have learned for two steps; the student's losses are others."""
    assert recipes.kept(f"{recipe} student") == recipes.kept(f"{recipe} regate")
    assert recipes[f"{recipe} student"]["losses"] == recipes[f"{recipe} regate"]["losses"]
    assert recipes[f"{recipe} plain"]["losses"] != recipes[f"{recipe.split()[0]} sft plain"]["losses"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_tensor_ranks_keep_what_one_rank_keeps(recipes, recipe):
    assert recipes.kept(f"{recipe} student tp2") == recipes.kept(f"{recipe} student")
    assert recipes[f"{recipe} student tp2"]["losses"][0] == pytest.approx(recipes[f"{recipe} student"]["losses"][0])
