"""Refusals, ends of data and groups given back, on four ranks; each claim is a function of run_rules.py."""

from __future__ import annotations

import pytest

from tests.launch import ROOT, succeed

CLAIMS = (
    "detach_gives_back_the_groups_that_attach_made dp4",
    "detach_gives_back_the_groups_that_attach_made tp2-pp2",
    "refused_attach_leaves_no_group dp4",
    "refused_attach_leaves_no_group tp2-pp2",
    "data_that_end_early_are_told_on_every_rank dp4",
    "data_that_end_early_are_told_on_every_rank tp2-pp2",
    "negative_labels_train_and_a_ratio_of_one_leaves_them_alone dp4",
    "dense_steps_are_plain_unless_they_are_dealt_and_then_have_the_gradient_of_the_same_batch dp4",
    "a_cut_that_weighs_targets_is_described cp2",
    "a_first_stage_without_layers_is_refused_with_a_way_out nolayer",
    "a_stage_without_adapters_takes_the_frozen_base_as_teacher_where_another_has_some tp2-pp2",
    "a_teacher_given_with_sequence_parallelism_scores_as_one_without tp2",
    "a_window_on_one_layer_is_refused tp2-pp2",
    "packed_rows_whose_positions_the_model_cuts_otherwise_are_refused_when_they_are_read packed-mrope",
    "gradients_learned_at_one_size_are_known_at_another dp4",
    "gradients_learned_at_one_size_are_known_at_another tp2",
)


@pytest.fixture(scope="module")
def verdicts() -> str:
    return succeed(4, [str(ROOT / "tests/multiprocess/run_rules.py")]).output


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds_on_four_ranks(verdicts, claim):
    assert f"holds: {claim}\n" in verdicts
