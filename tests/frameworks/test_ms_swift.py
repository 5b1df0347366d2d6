"""ms-swift's own Megatron trainer trains with the callback ``regate``, packed and padded rows; CPU and gloo."""

import pytest

from tests.frameworks.conftest import missing

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing("swift")), reason=missing("swift"))]


def test_keep_ratio_1_trains_bit_for_bit_as_without(trainer):
    assert trainer["all kept"]["losses"] == trainer["plain"]["losses"]


def test_sparse_steps_run_shorter_and_padded_rows_keep_what_packed_ones_keep(trainer):
    totals = trainer["regate"]["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["targets_kept"]) == (4, 2, 2 * 44 + 2 * 22)
    assert totals["positions_run"] < totals["positions_dense"]
    assert trainer["padded"]["losses"] == pytest.approx(trainer["regate"]["losses"], rel=1e-5)


def test_visual_positions_are_left_out(trainer):
    assert trainer["visual"]["totals"]["visual_kept"] == 2 * 12 + 2 * 6


def test_two_steps_and_two_more_are_four(trainer):
    """The state lies beside the trainer's checkpoint, the student as it was at first with it."""
    assert trainer["resumed"]["losses"] == trainer["regate"]["losses"][2:]
    assert trainer.kept("resumed") == {at: kept for at, kept in trainer.kept("regate").items() if at[0] > 2}


def test_model_and_trainer_are_left_as_they_were(trainer):
    assert trainer["regate"]["restored"] and not trainer["regate"]["attached at the end"]
