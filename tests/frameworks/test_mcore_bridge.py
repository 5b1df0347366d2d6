"""mcore-bridge's Qwen2.5-VL and Qwen3-VL with ``attach``, over ms-swift's batches, padded and packed; CPU and gloo.

Labels come unshifted and packing parameters are made in the step, as ms-swift's trainer does it.
"""

import pytest

from tests.frameworks.conftest import missing
from tests.frameworks.test_qwen_vl import from_their_start

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing("mcore_bridge")), reason=missing("mcore_bridge"))]

MODELS = ("qwen25", "qwen3")


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
    assert totals["targets_kept"] == 2 * 44 + 2 * 22 and totals["positions_run"] < totals["positions_dense"]


@pytest.mark.parametrize("model", MODELS)
def test_packed_rows_keep_what_padded_rows_keep(swift, model):
    assert from_their_start(swift.kept(f"{model} packed")) == swift.kept(f"{model} regate")
    assert swift[f"{model} packed"]["losses"] == pytest.approx(swift[f"{model} regate"]["losses"], rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_visual_positions_of_packed_rows_are_those_of_padded_rows(swift, model):
    assert from_their_start(swift.kept(f"{model} packed visual")) == swift.kept(f"{model} visual")
    assert swift[f"{model} visual"]["totals"]["visual_kept"] == 2 * 12 + 2 * 6


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_ranks_keep_the_same_positions(swift, model):
    assert swift.kept(f"{model} tp2") == swift.kept(f"{model} regate")


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_on_two_context_ranks_a_sparse_step_is_the_masked_full_length_step(swift, model, layers):
    result = swift[f"{model} exact cp2"][str(layers)]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


@pytest.mark.parametrize("model", MODELS)
def test_on_two_context_ranks_keep_ratio_1_trains_bit_for_bit_as_without(swift, model):
    assert swift[f"{model} cp2 all kept"]["losses"] == swift[f"{model} cp2 plain"]["losses"]


@pytest.mark.parametrize(
    ("layout", "like"), [("cp2", "regate"), ("packed cp2", "regate"), ("packed visual cp2", "visual")]
)
@pytest.mark.parametrize("model", MODELS)
def test_context_ranks_keep_what_one_rank_keeps(swift, model, layout, like):
    """Rows of 15 get one position of fill there, which no attention mask tells from text: it runs."""
    kept = from_their_start(swift.kept(f"{model} {layout}"))
    assert {at: own[:-1] if own[-1] == 15 else own for at, own in kept.items()} == swift.kept(f"{model} {like}")
    assert swift[f"{model} {layout}"]["losses"] == pytest.approx(swift[f"{model} {like}"]["losses"], rel=1e-5)
