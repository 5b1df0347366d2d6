"""Megatron-Bridge trains its Qwen2.5-VL, whose batches are read as the model reads them; CPU and gloo, a local spec."""

import pytest

from tests.frameworks.conftest import missing

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]


def test_positions_are_those_the_language_model_is_given(trainings):
    seen = trainings["qwen regate"]["reading"]
    assert seen["positions"] == seen["positions of the model"]


def test_placeholders_are_visual_context_and_padding_is_neither(trainings):
    seen = trainings["qwen regate"]["reading"]
    assert (seen["target"], seen["visual"], seen["context"]) == ([14, 16], [6, 0], [10, 3])


def test_keep_ratio_1_trains_bit_for_bit_as_without(trainings):
    everything, totals = trainings["qwen all kept"], trainings["qwen all kept"]["totals"]
    assert everything["losses"] == trainings["qwen plain"]["losses"]
    assert totals["targets_kept"] == totals["targets_total"]


def test_sparse_steps_run_shorter(trainings):
    totals = trainings["qwen regate"]["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (6, 3, 0)
    assert totals["targets_kept"] == 3 * 60 + 3 * 30
    assert totals["positions_run"] < totals["positions_dense"]


def test_student_and_its_checkpoint_are_the_same_teacher(trainings):
    assert trainings.kept("qwen checkpoint teacher") == trainings.kept("qwen regate")
    assert trainings["qwen checkpoint teacher"]["losses"] == trainings["qwen regate"]["losses"]


@pytest.mark.parametrize("layout", ["tp2", "dp2", "tp2 pp2", "tp2 pp2 vp2"])
def test_every_layout_keeps_the_same_positions(trainings, layout):
    assert trainings.kept(f"qwen {layout}") == trainings.kept("qwen regate")
    assert trainings[f"qwen {layout}"]["losses"] == pytest.approx(trainings["qwen regate"]["losses"], rel=1e-5)


def test_three_steps_and_three_more_are_six(trainings):
    assert trainings["qwen resumed"]["losses"] == trainings["qwen regate"]["losses"][3:]
    first, resumed = trainings.state("qwen regate", 6), trainings.state("qwen resumed", 6)
    assert (resumed["difficulty"], resumed["prior_file"]) == (first["difficulty"], first["prior_file"])


def from_their_start(kept):
    """Kept positions counted from each sample's first, which always runs."""
    return {at: [position - positions[0] for position in positions] for at, positions in kept.items()}


def base_is_the_teacher(trainings, model):
    """Of a training of adapters: the frozen base, adapters off, chooses as the checkpoint does that it comes from."""
    base, checkpoint = (f"{model} lora{name}" for name in ("", " checkpoint teacher"))
    assert trainings.kept(base) == trainings.kept(checkpoint)
    assert trainings[base]["losses"] == trainings[checkpoint]["losses"]
    assert trainings[base]["totals"]["sparse_steps"] == 3
    assert trainings[base]["losses"][1:] != trainings[f"{model} regate"]["losses"][1:]


def test_packed_with_keep_ratio_1_trains_bit_for_bit_as_without(trainings):
    assert trainings["qwen packed all kept"]["losses"] == trainings["qwen packed plain"]["losses"]


@pytest.mark.parametrize("packed", ["packed", "packed filled", "packed tp2", "packed dp2", "packed tp2 pp2"])
def test_packed_rows_keep_what_padded_rows_keep(trainings, packed):
    assert from_their_start(trainings.kept(f"qwen {packed}")) == trainings.kept("qwen each")
    assert trainings[f"qwen {packed}"]["losses"] == pytest.approx(trainings["qwen each"]["losses"], rel=1e-5)
    assert [phase for phase, *_ in trainings[f"qwen {packed}"]["steps"]].count("sparse") == 3


def test_visual_positions_of_packed_rows_are_those_of_padded_rows(trainings):
    assert from_their_start(trainings.kept("qwen packed visual")) == trainings.kept("qwen visual")
    assert trainings["qwen packed visual"]["losses"] == pytest.approx(trainings["qwen visual"]["losses"], rel=1e-5)
    rows = [row for record in trainings.trace("qwen visual")[-6:] for row in record["rows"]]
    assert {(row["num_visual"], row["num_kept_visual"]) for row in rows} == {(6, 3), (0, 0)}


def test_attach_is_a_pre_wrap_hook_of_bridge_s_provider(trainings):
    totals = trainings["qwen own loop"]["totals"]
    assert (totals["steps"], totals["sparse_steps"]) == (3, 2)
    assert (totals["targets_total"], totals["targets_kept"]) == (3 * 60, 60 + 2 * 30)


def test_plain_bridge_itself_cannot_run_it_on_two_context_ranks_so_it_is_refused(trainings):
    """A rank gets the whole row, 24 positions, and its half of the rotary table; ``attach`` has refused before."""
    assert trainings["qwen cp2"]["said"].startswith("The size of tensor a (24) must match the size of tensor b (12)")


@pytest.mark.parametrize("rule", ["static", "even"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_sparse_step_over_pictures_of_two_sizes_and_a_clip_is_the_masked_full_length_step(trainings, layers, rule):
    result = trainings["qwen media exact"][f"{layers} {rule}"]
    assert result["kept"] < result["dense"]
    assert result["loss_error"] <= 1e-6 and result["gradient_error"] <= 1e-5, result


def test_packed_samples_are_dealt_with_their_pictures(trainings):
    """The rows of one rank are the shorter ones: dealt out, both run as many positions, the same ones as one rank."""
    assert from_their_start(trainings.kept("qwen dealt dp2")) == from_their_start(trainings.kept("qwen dealt"))
    assert trainings["qwen dealt dp2"]["losses"] == pytest.approx(trainings["qwen dealt"]["losses"], rel=1e-5)
    ran, homes = {}, {}
    for record in trainings.trace("qwen dealt dp2"):
        if record["phase"] == "sparse":
            at = record["iteration"], record["dp_rank"]
            ran[at] = ran.get(at, 0) + record["kept_length"]
            for row in record["rows"]:
                homes.setdefault(row["num_targets"], set()).add(record["dp_rank"])
    assert all(ran[iteration, 0] == ran[iteration, 1] for iteration, _ in ran)
    assert all(ranks == {0, 1} for ranks in homes.values()), "no row left its rank"
