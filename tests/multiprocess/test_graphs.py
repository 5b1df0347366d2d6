"""CUDA graphs in dense steps alone, on two ranks; each claim is a function of run_graphs.py.

There is no CUDA here: graphs_without_cuda.py says what of Megatron's graphs is real, and what stands in.
"""

from __future__ import annotations

import pytest

from tests.launch import ROOT, succeed

WORKER = ROOT / "tests/multiprocess/run_graphs.py"
CLAIMS = (
    "graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone dp2",
    "graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone pp2",
    "graphs_are_made_of_the_first_dense_step_and_replayed_in_dense_ones_alone vpp2",
    "layers_that_predict_ahead_replay_in_dense_steps_alone ahead",
    "dense_steps_that_are_watched_for_gradients_replay llava",
    "after_a_sparse_step_that_died_dense_ones_replay_and_so_does_evaluation_always dp2",
    "a_run_that_begins_dense_replays_in_its_next_dense_step dp2",
    "a_run_that_begins_dense_replays_in_its_next_dense_step pp2",
    "a_short_sequence_would_find_no_graph dp2",
    "routers_with_graphs_of_their_own_are_off_and_dispatchers_keep_their_notes experts",
    "graphs_of_transformer_engine_are_replayed_in_dense_steps_alone dp2",
    "a_tower_is_without_graphs_in_sparse_steps llava",
    "teachers_have_no_graphs dp2",
    "teachers_have_no_graphs pp2",
    "what_is_off_is_described_and_given_back_after_each_step dp2",
    "a_module_that_does_not_ask_is_refused dp2",
)


@pytest.fixture(scope="module")
def verdicts() -> str:
    return succeed(2, [str(WORKER)]).output


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds_on_two_ranks(verdicts, claim):
    assert f"holds: {claim}\n" in verdicts
