"""Megatron-Bridge's loop over Megatron-energon, which packs samples; CPU and gloo."""

import pytest

from tests.frameworks.conftest import BRIDGE, missing
from tests.frameworks.test_qwen_vl import from_their_start

NEEDED = (*BRIDGE, "megatron.energon")
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing(*NEEDED)), reason=missing(*NEEDED))]


def test_energon_takes_none_of_bridge_s_own_task_encoders_to_pack_with(trainings):
    """So ``dataset.packing_buffer_size`` of Bridge's own configuration ends here, with ReGATE and without."""
    said = trainings["energon task encoders"]
    assert len(said) == 3 and all("methods must be provided in the TaskEncoder" in line for line in said.values())


@pytest.mark.parametrize("case", ["", " visual"])
def test_samples_that_energon_packs_keep_what_they_keep_in_padded_rows(trainings, case):
    """By Bridge's task encoder with energon's two methods added; samples follow one another as in padded rows."""
    packed, rows = f"qwen energon packed{case}", f"qwen energon{case}"
    assert from_their_start(trainings.kept(packed)) == trainings.kept(rows)
    assert trainings[packed]["losses"] == pytest.approx(trainings[rows]["losses"], rel=1e-5)
    totals = trainings[packed]["totals"]
    assert (totals["sparse_steps"], totals["fallback_steps"]) == (3, 0)
    assert totals["visual_kept"] == (54 if case else 72)


def test_what_energon_packs_trains_bit_for_bit_as_without_where_all_is_kept(trainings):
    assert trainings["qwen energon packed all kept"]["losses"] == trainings["qwen energon packed plain"]["losses"]
