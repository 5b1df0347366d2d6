"""Megatron-Bridge trains its Qwen3-VL, dense and MoE, whose first layers take visual features in (deepstack).

CPU and gloo; Transformer Engine's layers, which the model asks for by name, are replaced by Megatron's own.
"""

import pytest

from tests.frameworks.conftest import missing
from tests.frameworks.test_qwen_vl import base_is_the_teacher, from_their_start

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]

MODELS = ("qwen3", "qwen3_moe")


@pytest.mark.parametrize("pair", [("all kept", "plain"), ("packs all kept", "packs plain")])
def test_keep_ratio_1_trains_bit_for_bit_as_without(trainings, pair):
    kept, plain = (trainings[f"qwen3 {name}"] for name in pair)
    assert kept["losses"] == plain["losses"]


def test_keep_ratio_1_with_experts_trains_bit_for_bit_as_without(trainings):
    assert trainings["qwen3_moe all kept"]["losses"] == trainings["qwen3_moe plain"]["losses"]


@pytest.mark.parametrize("model", MODELS)
def test_sparse_steps_run_shorter(trainings, model):
    totals = trainings[f"{model} regate"]["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (6, 3, 0)
    assert totals["targets_kept"] == 3 * 60 + 3 * 30
    assert totals["positions_run"] < totals["positions_dense"]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_sparse_step_is_the_masked_full_length_step(trainings, model, layers):
    """Also where layers that take features in run short: 3 features, for the first 3 of 4 layers."""
    result = trainings[f"{model} exact"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_on_two_context_ranks_a_sparse_step_is_the_masked_full_length_step(trainings, model, layers):
    """Each holds a part of every row, of its rotary table, and of what the pictures add to the first layers."""
    result = trainings[f"{model} cp2 exact"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("rule", ["static", "even"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_sparse_step_over_pictures_and_a_clip_with_times_is_the_masked_full_length_step(trainings, layers, rule):
    result = trainings["qwen3 media exact"][f"{layers} {rule}"]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


def test_on_two_context_ranks_keep_ratio_1_trains_bit_for_bit_as_without(trainings):
    assert trainings["qwen3 cp2 all kept"]["losses"] == trainings["qwen3 cp2 plain"]["losses"]


@pytest.mark.parametrize(
    ("layout", "like"),
    [
        ("cp2", "tokens"),
        ("cp2 pp2", "tokens"),
        ("cp2 packs", "tokens"),
        ("cp2 packed", "tokens each"),
        ("cp2 visual", "tokens visual"),
        ("cp2 packs visual", "tokens visual"),
    ],
)
def test_context_ranks_keep_what_one_rank_keeps(trainings, layout, like):
    kept = trainings.kept(f"qwen3 {layout}")
    assert (from_their_start(kept) if layout == "cp2 packed" else kept) == trainings.kept(f"qwen3 {like}")
    assert trainings[f"qwen3 {layout}"]["losses"] == pytest.approx(trainings[f"qwen3 {like}"]["losses"], rel=1e-5)


def test_context_ranks_of_experts_keep_what_one_rank_keeps(trainings):
    dense, own = slice(3), trainings["qwen3_moe cp2"]["losses"]
    assert own[dense] == trainings["qwen3_moe cp2 plain"]["losses"][dense]
    assert trainings.kept("qwen3_moe cp2") == trainings.kept("qwen3_moe tokens")
    assert own == pytest.approx(trainings["qwen3_moe tokens"]["losses"], rel=1e-5)


def test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint(trainings):
    base_is_the_teacher(trainings, "qwen3_moe")


def test_student_and_its_checkpoint_are_the_same_teacher(trainings):
    assert trainings.kept("qwen3 checkpoint teacher") == trainings.kept("qwen3 regate")
    assert trainings["qwen3 checkpoint teacher"]["losses"] == trainings["qwen3 regate"]["losses"]


@pytest.mark.parametrize(("layout", "like"), [("dp2", "regate"), ("tp2", "regate"), ("tp2 pp2", "tp2")])
def test_every_layout_keeps_the_same_positions(trainings, layout, like):
    assert trainings.kept(f"qwen3 {layout}") == trainings.kept("qwen3 regate")
    if layout != "tp2":
        assert trainings[f"qwen3 {layout}"]["losses"] == pytest.approx(trainings[f"qwen3 {like}"]["losses"], rel=1e-5)


def test_dense_steps_in_tp2_are_those_of_plain_bridge_which_learns_otherwise_there_than_on_one_rank(trainings):
    """From the second step on plain Bridge's losses in TP2 are its own: 1e-3 away, with Megatron's own layers."""
    plain, alone = trainings["qwen3 plain tp2"]["losses"], trainings["qwen3 plain"]["losses"]
    assert trainings["qwen3 tp2"]["losses"][:3] == plain[:3]
    assert plain[0] == pytest.approx(alone[0], rel=1e-6) and plain[1] != pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["dp2", "dp2 ep2", "tp2", "pp2"])
def test_every_layout_of_experts_keeps_the_same_positions(trainings, layout):
    assert trainings.kept(f"qwen3_moe {layout}") == trainings.kept("qwen3_moe regate")
    losses, is_plain = trainings["qwen3_moe regate"]["losses"], layout == "tp2"  # plain Bridge learns otherwise there
    assert trainings[f"qwen3_moe {layout}"]["losses"] == pytest.approx(losses, rel=1e-2 if is_plain else 1e-5)


@pytest.mark.parametrize(("packed", "padded"), [("packs", "regate"), ("packs tp2", "tp2"), ("packed", "each")])
def test_rows_packed_by_the_step_or_the_collator_keep_what_padded_rows_keep(trainings, packed, padded):
    assert from_their_start(trainings.kept(f"qwen3 {packed}")) == trainings.kept(f"qwen3 {padded}")
    losses = trainings[f"qwen3 {padded}"]["losses"]
    assert trainings[f"qwen3 {packed}"]["losses"] == pytest.approx(losses, rel=1e-5)


def test_packed_experts_keep_what_padded_rows_keep(trainings):
    assert trainings.kept("qwen3_moe packs") == trainings.kept("qwen3_moe regate")


@pytest.mark.parametrize("model", MODELS)
def test_half_of_the_visual_positions_are_kept(trainings, model):
    rows = [row for record in trainings.trace(f"{model} visual")[-6:] for row in record["rows"]]
    assert {(row["num_visual"], row["num_kept_visual"]) for row in rows} == {(6, 3), (0, 0)}


def test_visual_positions_of_packed_rows_are_those_of_padded_rows(trainings):
    assert trainings.kept("qwen3 packs visual") == trainings.kept("qwen3 visual")


@pytest.mark.parametrize("model", MODELS)
def test_three_steps_and_three_more_are_six(trainings, model):
    assert trainings[f"{model} resumed"]["losses"] == trainings[f"{model} regate"]["losses"][3:]
