"""Megatron-Bridge's own loop trains with ReGATE switched on by one callback; CPU and gloo, a local layer spec."""

import pytest

from tests.frameworks.conftest import missing

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]

LAYOUTS = ("tp2", "pp2", "pp2 vp2", "dp2", "tp2 pp2")


def test_without_regate_nothing_is_wrapped(trainings):
    assert trainings["plain"]["steps"] == [] and trainings["plain"]["loop restored"]


def test_keep_ratio_1_trains_bit_for_bit_as_without(trainings):
    everything, totals = trainings["all kept"], trainings["all kept"]["totals"]
    assert everything["losses"] == trainings["plain"]["losses"]
    assert totals["targets_kept"] == totals["targets_total"] and totals["teacher_us"] == 0


def test_every_step_counts_once_and_sparse_steps_follow_the_warm_up(trainings):
    assert trainings["regate"]["steps"] == [
        ["warmup", 1, 0],
        ["warmup", 2, 0],
        ["dense", 3, 0],
        ["sparse", 4, 1],
        ["sparse", 5, 2],
        ["sparse", 6, 3],
    ]
    assert trainings["regate"]["losses"][:3] == trainings["plain"]["losses"][:3]
    assert trainings["regate"]["losses"][3:] != trainings["plain"]["losses"][3:]


def test_last_layer_runs_short_in_sparse_steps_only_and_evaluation_runs_long(trainings):
    lengths = trainings["regate"]["lengths"]
    trained = [length for training, with_gradient, length in lengths if training and with_gradient]
    assert trained[:6] == [24] * 6 and set(trained[6:]) == {16}  # 8 of prompt and half of the 16 answer tokens
    evaluated = [length for training, _, length in lengths if not training]
    assert evaluated and set(evaluated) == {24} and trainings["regate"]["evaluations"] > 0


def test_half_of_the_targets_are_kept_and_every_microbatch_is_traced(trainings):
    totals = trainings["regate"]["totals"]
    assert (totals["targets_total"], totals["targets_kept"]) == (6 * 4 * 16, 3 * 4 * 16 + 3 * 4 * 8)
    assert [record["iteration"] for record in trainings.trace("regate")] == [n for n in range(1, 7) for _ in range(2)]


def test_it_says_so_when_attached_and_at_every_log_interval(trainings):
    lines = [line for line in trainings.log("regate").splitlines() if "[regate]" in line]
    assert "attached to GPTModel" in lines[0]
    assert "--calculate-per-token-loss is off" in lines[1]
    assert [line for line in lines if "is it worth it?" in line] == lines[4:5]  # after the first with a sparse step
    del lines[4]
    assert [line.split("iteration ")[1].split(" ")[0] for line in lines[2:]] == ["2", "4", "6"]
    assert "targets kept 64/128 (50.0%)" in lines[-1]


def test_model_and_loop_are_left_as_they_were(trainings):
    assert trainings["regate"]["loop restored"] and not trainings["regate"]["attached at the end"]


def test_a_checkpoint_of_bridge_s_is_a_teacher(trainings):
    """It holds the weights that the student begins with: both teachers must choose alike."""
    assert trainings.kept("checkpoint teacher") == trainings.kept("regate")
    assert trainings["checkpoint teacher"]["losses"] == trainings["regate"]["losses"]


def test_global_batches_of_finetuning_are_elided_too(trainings):
    case = trainings["finetuning batches"]
    assert case["steps"] == trainings["regate"]["steps"]
    assert case["totals"]["targets_kept"] == trainings["regate"]["totals"]["targets_kept"]


def test_context_ranks_keep_what_one_rank_keeps(trainings):
    """Dense steps are plain Bridge's, which learns otherwise there than on one rank from the second step on."""
    assert trainings.kept("cp2") == trainings.kept("regate")
    plain, alone = trainings["cp2 plain"]["losses"], trainings["plain"]["losses"]
    assert trainings["cp2"]["losses"][:3] == plain[:3]
    assert plain[0] == pytest.approx(alone[0], rel=1e-6) and plain[1] != pytest.approx(alone[1], rel=1e-5)


def test_packed_rows_of_text_keep_what_rows_of_their_own_keep(trainings):
    """Packed, all kept: plain Bridge bit for bit. Sparse: each sample's own share, as in rows."""
    assert trainings["packed all kept"]["losses"] == trainings["packed plain"]["losses"]
    kept = {at: [position - own[0] for position in own] for at, own in trainings.kept("packed").items()}
    assert kept == trainings.kept("each")
    assert trainings["packed"]["losses"] == pytest.approx(trainings["each"]["losses"], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_same_positions(trainings, layout):
    assert trainings.kept(layout) == trainings.kept("regate")
    assert trainings[layout]["losses"] == pytest.approx(trainings["regate"]["losses"], rel=1e-5)


@pytest.mark.parametrize("case", ["offline", "offline padded", "offline padded dp2"])
def test_packed_rows_of_text_in_the_offline_format_keep_what_rows_of_their_own_keep(trainings, case):
    """Bridge's own format and loader; filled up to a multiple, a sample has a position of its own after its targets."""
    own = {key: kept for (_, key), kept in trainings.kept("reference").items()}
    found = {at: [position - kept[0] for position in kept] for at, kept in trainings.kept(case).items() if kept}
    sparse = {at: [position for position in kept if position < 24] for at, kept in found.items() if at[0] > 3}
    assert len(sparse) >= 6 and all(kept == own[key] for (_, key), kept in sparse.items())
    assert trainings[case]["losses"] == pytest.approx(trainings["offline"]["losses"], rel=1e-5)


def test_packed_rows_of_text_in_the_offline_format_train_bit_for_bit_as_without_where_all_is_kept(trainings):
    assert trainings["offline all kept"]["losses"] == trainings["offline plain"]["losses"]
    totals = trainings["offline"]["totals"]
    assert totals["targets_kept"] < totals["targets_total"] and totals["positions_run"] < totals["positions_dense"]


def test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint(trainings):
    assert trainings["lora all kept"]["losses"] == trainings["lora plain"]["losses"]
    assert trainings.kept("lora") == trainings.kept("lora checkpoint teacher")
    assert trainings["lora"]["losses"] == trainings["lora checkpoint teacher"]["losses"]
    assert trainings["lora resumed"]["losses"] == trainings["lora"]["losses"][3:]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_the_frozen_base_is_the_same_teacher_in_every_layout(trainings, layout):
    """Adapters begin otherwise there, and so learn otherwise; what they are measured by does not."""
    assert trainings.kept(f"lora {layout}") == trainings.kept("lora reference")


def test_a_model_that_predicts_ahead_keeps_the_same_positions(trainings):
    assert trainings["ahead all kept"]["losses"] == trainings["ahead plain"]["losses"]
    assert trainings.kept("ahead tp2 pp2") == trainings.kept("ahead")
    assert trainings["ahead tp2 pp2"]["losses"] == pytest.approx(trainings["ahead"]["losses"], rel=1e-5)


def test_three_steps_and_three_more_are_six(trainings):
    """Bit for bit: losses, kept positions, and what was learned by the end."""
    assert trainings["resumed"]["losses"] == trainings["regate"]["losses"][3:]
    assert trainings.kept("resumed") == {at: kept for at, kept in trainings.kept("regate").items() if at[0] > 3}
    first, resumed = trainings.state("regate", 6), trainings.state("resumed", 6)
    assert (resumed["difficulty"], resumed["prior_file"]) == (first["difficulty"], first["prior_file"])
    line = next(line for line in trainings.log("resumed").splitlines() if "resumed at" in line)
    assert line == "[regate] resumed at iteration 3: difficulty of 192 targets in 12 samples restored"


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_difficulty_comes_back_in_another_layout(trainings, layout):
    resumed = f"resumed {layout}"
    assert trainings.kept(resumed) == {at: kept for at, kept in trainings.kept("regate").items() if at[0] > 3}
    assert trainings[resumed]["losses"] == pytest.approx(trainings["regate"]["losses"][3:], rel=1e-5)


def test_without_regate_the_same_checkpoint_loads(trainings):
    assert len(trainings["plain after regate"]["losses"]) == 3
