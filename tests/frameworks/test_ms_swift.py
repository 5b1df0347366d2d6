"""ms-swift's command line ``megatron sft`` trains with the callback ``regate``, all parameters and adapters.

The lines are those of its multimodal examples, shrunk; CPU and gloo, Megatron's own layers.
"""

import json

import pytest

from tests.frameworks.conftest import missing
from tests.frameworks.test_qwen_vl import from_their_start

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing("swift")), reason=missing("swift"))]

FAMILIES = ("qwen25", "qwen3")
LINES = [f"{family} {tuner}" for family in FAMILIES for tuner in ("full", "lora")]


@pytest.mark.parametrize("line", LINES)
def test_keep_ratio_1_trains_bit_for_bit_as_without(trainer, line):
    assert trainer[f"{line} all kept"]["losses"] == trainer[f"{line} plain"]["losses"]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_otherwise_than_all_parameters(trainer, family):
    full, lora = trainer[f"{family} full plain"], trainer[f"{family} lora plain"]
    assert (full["tuner"], lora["tuner"]) == ("full", "lora") and full["losses"][1:] != lora["losses"][1:]


@pytest.mark.parametrize("line", LINES)
def test_sparse_steps_run_shorter(trainer, line):
    seen, plain = trainer[f"{line} regate"], trainer[f"{line} plain"]["losses"]
    totals = seen["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (4, 2, 0)
    assert totals["positions_run"] < totals["positions_dense"]
    assert seen["losses"][:2] == plain[:2] and seen["losses"][2:] != plain[2:]


@pytest.mark.parametrize("line", LINES)
def test_every_sample_keeps_half_of_its_targets_and_of_its_picture(trainer, line):
    sparse = [one for one in trainer.trace(f"{line} visual") if one["phase"] == "sparse"]
    rows = [row for one in sparse for row in one["rows"]]
    assert len(rows) == 2 * 8
    for row in rows:
        assert row["num_kept_targets"] == -(-row["num_targets"] // 2)
        assert (row["num_visual"], row["num_kept_visual"]) == (64, 32)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_keeps_the_same_positions(trainer, family, layout):
    """With sequence parallelism in TP2."""
    own, one = f"{family} full {layout}", f"{family} full regate"
    assert trainer.kept(own) == trainer.kept(one)
    assert trainer[own]["losses"] == pytest.approx(trainer[one]["losses"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_context_ranks_keep_what_one_rank_keeps(trainer, family):
    """The template fills each sample up there, and nothing tells fill from text: it runs."""
    own, one = (from_their_start(trainer.kept(f"{family} full {name}")) for name in ("cp2", "regate"))
    assert {at: [place for place in kept if place <= one[at][-1]] for at, kept in own.items()} == one
    assert sum(map(len, own.values())) > sum(map(len, one.values()))
    losses = trainer[f"{family} full regate"]["losses"]
    assert trainer[f"{family} full cp2"]["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_adapters_keep_the_same_positions_in_every_layout(trainer, layout):
    """Those begin with other random numbers there; their base, which alone tells what is kept, does not."""
    assert trainer.kept(f"qwen25 lora {layout}") == trainer.kept("qwen25 lora regate")
    seen, one = (trainer[f"qwen25 lora {name}"] for name in (layout, "regate"))
    assert seen["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6) and seen["totals"]["sparse_steps"] == 2


def test_evaluation_is_dense_and_leaves_training_alone(trainer):
    seen, plain = (trainer[f"qwen25 full evaluated{how}"] for how in ("", " plain"))
    assert seen["losses"] == trainer["qwen25 full regate"]["losses"]
    assert seen["evaluated"][0] == plain["evaluated"][0] and len(seen["evaluated"]) == 2  # the first after dense steps
    assert trainer.trace("qwen25 full evaluated") == trainer.trace("qwen25 full regate")


def test_padded_rows_keep_what_packed_ones_keep(trainer):
    padded, packed = "qwen25 full padded", "qwen25 full regate"
    assert not trainer[padded]["packs"] and trainer[packed]["packs"]
    assert from_their_start(trainer.kept(packed)) == from_their_start(trainer.kept(padded))
    assert trainer[padded]["losses"] == pytest.approx(trainer[packed]["losses"], rel=1e-5)


def test_plain_ms_swift_itself_mixes_up_the_pictures_of_padded_rows_of_qwen3(trainer):
    """mcore-bridge adds features of deeper layers, which lie row by row, position by position over all rows."""
    padded, packed = (trainer[f"qwen3 full {rows}plain"]["losses"] for rows in ("padded ", ""))
    assert padded[0] != pytest.approx(packed[0], rel=1e-5)
    assert trainer["qwen3 full padded"]["losses"][:2] == padded[:2]


@pytest.mark.parametrize("line", LINES)
def test_two_steps_and_two_more_are_four(trainer, line):
    """From the trainer's own checkpoint, in which the state lies: with its teacher, or beside the adapters alone."""
    assert trainer[f"{line} resumed"]["losses"] == trainer[f"{line} visual"]["losses"][2:]
    before = trainer.kept(f"{line} visual")
    assert trainer.kept(f"{line} resumed") == {at: kept for at, kept in before.items() if at[0] > 2}


def test_the_frozen_base_with_its_adapters_off_is_the_teacher_of_its_checkpoint(trainer):
    """The checkpoint is the first student of the full training; what is learned says of both that they are one."""
    base, of_checkpoint = "qwen25 lora visual", "qwen25 lora checkpoint"
    assert trainer.kept(base) == trainer.kept(of_checkpoint)
    assert trainer[base]["losses"] == trainer[of_checkpoint]["losses"]
    teachers = [_state(trainer, case)["teacher"]["weights"] for case in (base, of_checkpoint, "qwen25 full visual")]
    assert len(set(teachers)) == 1


def test_what_was_learned_goes_on_with_exported_adapters(trainer):
    """Their optimizer begins anew, as ms-swift has it."""
    assert trainer["qwen25 lora exported"]["totals"]["steps"] == 4
    assert _state(trainer, "qwen25 lora exported", 4)["step"] == 4


@pytest.mark.parametrize("line", LINES)
def test_model_and_trainer_are_left_as_they_were(trainer, line):
    assert trainer[f"{line} regate"]["restored"]


@pytest.mark.parametrize(
    ("line", "given"), [("lora merged", "--merge_lora True"), ("lora_llm", "--tuner_type lora_llm")]
)
def test_a_base_that_does_not_stay_is_refused(trainer, line, given):
    said = [text for text in trainer.log(f"qwen25 {line}").splitlines() if text.startswith("regate: ")]
    assert len(said) == 1 and f"given {given}" in said[0] and "allowed" in said[0] and "change" in said[0]


def _state(trainer, case, iteration=2):
    return json.loads((trainer.folder / case / f"checkpoint-{iteration}" / "regate" / "state.json").read_text())
