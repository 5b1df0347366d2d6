"""mcore-bridge's multimodal families with ``attach``, over ms-swift's batches, padded and packed; CPU and gloo.

Labels come unshifted and packing parameters are made in the step, as ms-swift's trainer does it.
"""

import pytest

from tests.frameworks.conftest import missing
from tests.frameworks.test_qwen_vl import from_their_start

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing("mcore_bridge")), reason=missing("mcore_bridge"))]

# Visual positions of a row with a picture.
MODELS = {"qwen2": 6, "qwen25": 6, "qwen3": 6, "internvl": 8, "internvl_qwen3": 8, "internvl_chat": 8}
MODELS |= {"llava_onevision": 6, "glm4v": 6, "glm4v_moe": 6, "kimi": 6, "kimi_k25": 6, "qwen3_moe": 6}
WITH_BIASED_EXPERTS = ("glm4v_moe", "kimi", "kimi_k25")
WITH_EXPERTS, FIRST = (*WITH_BIASED_EXPERTS, "qwen3_moe"), ("qwen25", "qwen3")
TRAIN_ALIKE = [model for model in MODELS if model not in ("qwen3", *WITH_EXPERTS)]


@pytest.mark.parametrize("rows", ["", "packed "])
@pytest.mark.parametrize("model", MODELS)
def test_keep_ratio_1_trains_bit_for_bit_as_without(swift, model, rows):
    assert swift[f"{model} {rows}all kept"]["losses"] == swift[f"{model} {rows}plain"]["losses"]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_sparse_step_is_the_masked_full_length_step(swift, model, layers):
    result = swift[f"{model} exact"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("model", MODELS)
def test_sparse_steps_run_shorter(swift, model):
    totals = swift[f"{model} regate"]["totals"]
    assert (totals["sparse_steps"], totals["fallback_steps"]) == (2, 0)
    targets = 2 * (16 - MODELS[model]) + 2 * 12
    assert totals["targets_kept"] == 2 * targets + 2 * targets // 2
    assert totals["positions_run"] < totals["positions_dense"]


@pytest.mark.parametrize("model", MODELS)
def test_packed_rows_keep_what_padded_rows_keep(swift, model):
    assert from_their_start(swift.kept(f"{model} packed")) == swift.kept(f"{model} regate")
    assert swift[f"{model} packed"]["losses"] == pytest.approx(swift[f"{model} regate"]["losses"], rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_visual_positions_of_packed_rows_are_those_of_padded_rows(swift, model):
    assert from_their_start(swift.kept(f"{model} packed visual")) == swift.kept(f"{model} visual")
    visual = 2 * MODELS[model]
    assert swift[f"{model} visual"]["totals"]["visual_kept"] == 2 * visual + 2 * visual // 2


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_keeps_the_same_positions(swift, model, layout):
    _as_on_one_rank(swift, model, layout)


@pytest.mark.parametrize("model", WITH_EXPERTS)
def test_expert_parallel_ranks_keep_the_same_positions(swift, model):
    _as_on_one_rank(swift, model, "ep2")


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("model", MODELS)
def test_dense_steps_of_a_layout_are_those_of_plain_mcore_bridge(swift, model, layout):
    dense = slice(2 if model in TRAIN_ALIKE else 1)  # what does not train alike keeps its weights here
    assert swift[f"{model} {layout}"]["losses"][dense] == swift[f"{model} {layout} plain"]["losses"][dense]


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_and_two_more_are_four(swift, model):
    assert swift[f"{model} resumed"]["losses"] == swift[f"{model} visual"]["losses"][2:]
    before = swift.kept(f"{model} visual")
    assert swift.kept(f"{model} resumed") == {at: kept for at, kept in before.items() if at[0] > 2}


@pytest.mark.parametrize("model", MODELS)
def test_adapters_with_keep_ratio_1_train_bit_for_bit_as_without(swift, model):
    assert swift[f"{model} lora all kept"]["losses"] == swift[f"{model} lora plain"]["losses"]
    assert swift[f"{model} lora plain"]["losses"][1:] != swift[f"{model} plain"]["losses"][1:]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_sparse_step_of_adapters_is_the_masked_full_length_step(swift, model, layers):
    result = swift[f"{model} lora exact"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["gradients"] > 0 and result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("model", MODELS)
def test_the_frozen_base_is_the_teacher_that_the_model_without_adapters_is(swift, model):
    """Bit for bit, when the adapters have learned for two steps; on routers, too, which peft's own switch passes by."""
    base, taught = (f"{model} lora {name}" for name in ("visual", "taught"))
    assert swift.kept(base) == swift.kept(taught) and swift[base]["losses"] == swift[taught]["losses"]
    (scores, of_taught) = (
        [row["scores"] for one in swift.trace(name) for row in one["rows"]] for name in (base, taught)
    )
    assert scores == of_taught and any(scores)


@pytest.mark.parametrize("model", MODELS)
def test_adapters_keep_the_same_of_packed_rows_and_visual_positions(swift, model):
    assert from_their_start(swift.kept(f"{model} lora packed")) == swift.kept(f"{model} lora")
    visual = 2 * MODELS[model]
    assert swift[f"{model} lora visual"]["totals"]["visual_kept"] == 2 * visual + 2 * visual // 2


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_of_adapters_and_two_more_are_four(swift, model):
    assert swift[f"{model} lora resumed"]["losses"] == swift[f"{model} lora visual"]["losses"][2:]
    before = swift.kept(f"{model} lora visual")
    assert swift.kept(f"{model} lora resumed") == {at: kept for at, kept in before.items() if at[0] > 2}


@pytest.mark.parametrize(
    ("model", "layout"),
    [(m, to) for m in MODELS for to in ("tp2", "pp2", "dp2") if to != "tp2" or m not in WITH_EXPERTS]
    + [(m, "ep2") for m in WITH_EXPERTS],
)
def test_adapters_keep_the_same_positions_in_every_layout(swift, model, layout):
    """Sequence parallelism is on in TP2: the base runs as the student does."""
    assert swift.kept(f"{model} lora {layout}") == swift.kept(f"{model} lora visual")
    assert swift[f"{model} lora {layout}"]["losses"] == pytest.approx(swift[f"{model} lora visual"]["losses"], rel=1e-5)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("model", MODELS)
def test_dense_steps_of_adapters_in_a_layout_are_those_of_plain_mcore_bridge(swift, model, layout):
    assert swift[f"{model} lora {layout}"]["losses"][:2] == swift[f"{model} lora {layout} plain"]["losses"][:2]


@pytest.mark.parametrize("model", WITH_EXPERTS)
def test_adapters_of_routers_train_otherwise_in_tp2_without_regate(swift, model):
    plain, alone = (swift[f"{model} lora {name}"]["losses"] for name in ("tp2 plain", "plain"))
    assert plain != pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("model", sorted(MODELS.keys() - set(TRAIN_ALIKE)))
def test_what_trains_otherwise_in_tp2_does_so_without_regate(swift, model):
    assert swift[f"{model} tp2 plain"]["losses"] != pytest.approx(swift[f"{model} plain"]["losses"], rel=1e-5)


def test_rows_whose_length_would_change_the_frequencies_are_refused(swift):
    said = swift["too long refused"]
    assert said.startswith("regate: RoPE scaling: given rows of 20 positions") and "up to 16 positions" in said


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_on_two_context_ranks_a_sparse_step_is_the_masked_full_length_step(swift, model, layers):
    result = swift[f"{model} exact cp2"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("model", MODELS)
def test_on_two_context_ranks_keep_ratio_1_trains_bit_for_bit_as_without(swift, model):
    assert swift[f"{model} cp2 all kept"]["losses"] == swift[f"{model} cp2 plain"]["losses"]


@pytest.mark.parametrize("model", FIRST)
def test_on_two_context_ranks_keep_ratio_1_trains_filled_rows_bit_for_bit_as_without(swift, model):
    assert swift[f"{model} filled all kept cp2"]["losses"] == swift[f"{model} filled plain cp2"]["losses"]


@pytest.mark.parametrize("model", MODELS)
def test_plain_mcore_bridge_fails_over_two_padded_pictures_of_qwen3_on_two_context_ranks(swift, model):
    """It counts the visual positions of all rows into the first."""
    said = swift[f"{model} two pictures"]
    assert said.startswith("shape mismatch") if model.startswith("qwen3") else not said, said


CONTEXT = {"cp2": "regate", "packed cp2": "regate", "packed visual cp2": "visual", "lora cp2": "lora visual"}
CONTEXT |= {"filled cp2": "visual"}
EVERYWHERE = "packed visual cp2"


@pytest.mark.parametrize(
    ("model", "layout"), [(m, to) for m in MODELS for to in CONTEXT if m in FIRST or to == EVERYWHERE]
)
def test_context_ranks_keep_what_one_rank_keeps(swift, model, layout):
    """Rows of 15 get one position of fill there, which no attention mask tells from text: it runs, and moves the bias
    of an expert that it takes, of plain mcore-bridge's too, which then learns a little otherwise.

    What fills a packed row behind its samples is samples of which nothing runs.
    """
    like = CONTEXT[layout]
    kept = {at: own for at, own in from_their_start(swift.kept(f"{model} {layout}")).items() if own}
    assert {at: own[:-1] if own[-1] == 15 else own for at, own in kept.items()} == swift.kept(f"{model} {like}")
    error = 1e-4 if model in WITH_BIASED_EXPERTS else 1e-5
    assert swift[f"{model} {layout}"]["losses"] == pytest.approx(swift[f"{model} {like}"]["losses"], rel=error)


def _as_on_one_rank(swift, model, layout):
    one = f"{model} {'visual' if model in TRAIN_ALIKE else 'still'}"
    assert swift.kept(f"{model} {layout}") == swift.kept(one)
    assert swift[f"{model} {layout}"]["losses"] == pytest.approx(swift[one]["losses"], rel=1e-5)
