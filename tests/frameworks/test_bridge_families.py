"""Megatron-Bridge trains GLM-4.5V and Ministral 3, in their own classes; CPU and gloo, Megatron's own layers.

GLM-4.5V: every other medium is a video, whose frames have the placeholders of pictures and text between them. Ministral
3: pictures of several lines, rows three times as long as the maximum from where on queries are scaled by their place;
packed, rows end before it (``ministral_short``).
"""

import pytest

from tests.frameworks.conftest import missing
from tests.frameworks.test_qwen_vl import base_is_the_teacher, from_their_start

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]

MODELS = ("glm", "ministral")
PACKED = ("glm", "ministral_short")


@pytest.mark.parametrize("reading", ["reading", "reading of a video"])
def test_positions_are_those_the_language_model_is_given(trainings, reading):
    seen = trainings["glm regate"][reading]
    assert seen["positions"] == seen["positions of the model"]
    assert (seen["target"], seen["visual"], seen["context"]) == ([14, 16], [6, 0], [10, 3])


@pytest.mark.parametrize("model", MODELS)
def test_keep_ratio_1_trains_bit_for_bit_as_without(trainings, model):
    assert trainings[f"{model} all kept"]["losses"] == trainings[f"{model} plain"]["losses"]


@pytest.mark.parametrize("model", PACKED)
def test_keep_ratio_1_of_packed_rows_trains_bit_for_bit_as_without(trainings, model):
    assert trainings[f"{model} packed all kept"]["losses"] == trainings[f"{model} packed plain"]["losses"]


@pytest.mark.parametrize("model", MODELS)
def test_sparse_steps_run_shorter(trainings, model):
    totals = trainings[f"{model} regate"]["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (6, 3, 0)
    assert totals["targets_kept"] == 3 * 60 + 3 * 30
    assert totals["positions_run"] < totals["positions_dense"]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", (*MODELS, "ministral recomputed"))
def test_a_sparse_step_is_the_masked_full_length_step(trainings, model, layers):
    result = trainings[f"{model} exact"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("model", MODELS)
def test_student_and_its_checkpoint_are_the_same_teacher(trainings, model):
    assert trainings.kept(f"{model} checkpoint teacher") == trainings.kept(f"{model} regate")
    assert trainings[f"{model} checkpoint teacher"]["losses"] == trainings[f"{model} regate"]["losses"]


LAYOUTS = [*((model, layout) for model in MODELS for layout in ("tp2", "dp2", "tp2 pp2")), ("glm", "dp2 ep2")]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_every_layout_keeps_the_same_positions(trainings, model, layout):
    assert trainings.kept(f"{model} {layout}") == trainings.kept(f"{model} regate")
    losses = trainings[f"{model} regate"]["losses"]
    assert trainings[f"{model} {layout}"]["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("packed", ["packed", "packed tp2", "packed dp2"])
@pytest.mark.parametrize("model", PACKED)
def test_packed_rows_keep_what_padded_rows_keep(trainings, model, packed):
    assert from_their_start(trainings.kept(f"{model} {packed}")) == trainings.kept(f"{model} each")
    assert trainings[f"{model} {packed}"]["losses"] == pytest.approx(trainings[f"{model} each"]["losses"], rel=1e-5)


@pytest.mark.parametrize("model", PACKED)
def test_visual_positions_of_packed_rows_are_those_of_padded_rows(trainings, model):
    assert from_their_start(trainings.kept(f"{model} packed visual")) == trainings.kept(f"{model} visual")
    rows = [row for record in trainings.trace(f"{model} visual")[-6:] for row in record["rows"]]
    assert {(row["num_visual"], row["num_kept_visual"]) for row in rows} == {(6, 3), (0, 0)}


@pytest.mark.parametrize("model", MODELS)
def test_three_steps_and_three_more_are_six(trainings, model):
    assert trainings[f"{model} resumed"]["losses"] == trainings[f"{model} regate"]["losses"][3:]


@pytest.mark.parametrize("model", MODELS)
def test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint(trainings, model):
    base_is_the_teacher(trainings, model)


def test_plain_bridge_itself_cannot_run_glm_on_two_context_ranks_so_it_is_refused(trainings):
    """A rank gets the whole row, 24 positions, and its half of the rotary table; ``attach`` has refused before."""
    assert trainings["glm cp2"]["said"].startswith("The size of tensor a (24) must match the size of tensor b (12)")


def test_plain_bridge_itself_scales_queries_of_ministral_by_other_places_on_two_context_ranks(trainings):
    """Each counts from 0, so the first loss is another already; ``attach`` refuses it."""
    two, one = (trainings[f"ministral {name}"]["losses"][0] for name in ("cp2 plain", "plain"))
    assert two != pytest.approx(one, rel=2e-6)
