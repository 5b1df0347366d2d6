"""Each pipeline stage expects microbatches in the order in which its neighbours send them, forward and backward."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from regate_megatron.decoder.pipeline import check_arguments, receive_order
from regate_megatron.errors import ReGateError


@st.composite
def schedules(draw) -> tuple[int, int, int, int]:
    """Stages, chunks, microbatches, and microbatches that a chunk runs before the next one does."""
    stages, chunks = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    group = draw(st.integers(stages, 2 * stages))
    whole, rest = draw(st.integers(1, 3)), draw(st.sampled_from([0, *range(stages, group)]))  # what Megatron accepts
    return stages, chunks, whole * group + rest, group


def _sent(stages: int, chunks: int, count: int, group: int, stage: int, *, forward: bool) -> list[int]:
    """Microbatches that a stage has a result of to send, in the order in which it computes them.

    Stage s has the chunks s, s + stages, ... of the model; forward, the model's last chunk sends nothing; backward,
    chunks are computed from the last to the first, and the model's first chunk sends nothing.
    """
    sent = []
    for index, chunk in get_schedule_table(count, chunks, group):
        place = (chunk if forward else chunks - 1 - chunk) * stages + stage
        if place != (stages * chunks - 1 if forward else 0):
            sent.append(index)
    return sent


@given(schedules())
def test_stage_receives_in_the_order_in_which_its_neighbour_sends(schedule):
    stages, chunks, count, group = schedule
    for stage in range(stages):
        ends = {"is_first": stage == 0, "is_last": stage == stages - 1}
        forward, backward = receive_order(count, chunks, group, **ends)
        before, after = (stage - 1) % stages, (stage + 1) % stages
        assert forward == _sent(*schedule, before, forward=True) or (stage == 0 and chunks == 1)
        assert backward == _sent(*schedule, after, forward=False) or (stage == stages - 1 and chunks == 1)


def test_one_chunk_receives_every_microbatch_in_order_and_the_ends_nothing_from_outside():
    assert receive_order(3, 1, 3, is_first=True, is_last=False) == ([], [0, 1, 2])
    assert receive_order(3, 1, 3, is_first=False, is_last=True) == ([0, 1, 2], [])


def test_groups_of_microbatches_go_through_all_chunks_before_the_next_group():
    forward, backward = receive_order(4, 2, 2, is_first=True, is_last=False)
    assert (forward, backward) == ([0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "given"),
    [({"p2p_communicator": {}}, "a dict"), ({"adjust_tensor_shapes_fn": max}, "adjust_tensor_shapes_fn")],
)
def test_what_sends_other_shapes_is_refused(arguments, given):
    check_arguments({"p2p_communicator": None, "adjust_tensor_shapes_fn": None})
    with pytest.raises(ReGateError, match=f"given {given}; allowed a P2PCommunicator .*; change the host"):
        check_arguments(arguments)
