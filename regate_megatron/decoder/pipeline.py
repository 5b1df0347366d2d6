"""Pipeline stages whose microbatches differ in length: every receive is given its shape from the plan.

Every rank of a replica knows the lengths of the step, and a stage sends its results in the order in which it computes
them. So the shape of each receive is known before it is posted, also where the schedule posts it ahead: nothing is
asked, nothing is sent beside the states, and the device is not waited for.

Means: the communicator is an argument of Megatron-Core's schedules (``p2p_communicator``). For the length of one call
it gets two instance attributes: ``_communicate_shapes``, which answers from the plan where Megatron would exchange
shapes, and a copy of its config with ``variable_seq_lengths`` on, which makes it ask. The model's own config stays as
it is. Where the host passes no communicator, one is made as the schedule itself would make it. Core 0.17 to 0.20-dev
agree in what is used of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from regate_megatron.decoder.exchange import Layout, ShardedPlan
from regate_megatron.errors import refuse

_NONE = [0, 0, 0]  # what Megatron answers where nothing is received


@contextmanager
def shapes_from(
    plans: Sequence[ShardedPlan], layout: Layout, num_chunks: int, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The schedule's ``arguments`` with a communicator that knows the shape of every receive of the step.

    Args:
        plans: one per microbatch.
        layout: this rank's part of a sequence.
        num_chunks: model chunks of this rank.
    """
    arguments = dict(arguments)
    if arguments.get("p2p_communicator") is None and arguments.get("pg_collection") is None:
        arguments.update(_defaults(arguments["model"]))
    communicator = arguments["p2p_communicator"]
    config = communicator.config
    group = config.microbatch_group_size_per_vp_stage if num_chunks > 1 else len(plans)
    ends = {"is_first": communicator.is_pp_first_stage, "is_last": communicator.is_pp_last_stage}
    forward, backward = receive_order(len(plans), num_chunks, group, **ends)
    shapes = [_shape(plan, layout, config.hidden_size) for plan in plans]
    from_prev, from_next = (iter([shapes[index] for index in order]) for order in (forward, backward))

    def known_shapes(_next: Any, _prev: Any, recv_prev: bool, recv_next: bool) -> tuple[list[int], list[int]]:
        return next(from_prev) if recv_prev else _NONE, next(from_next) if recv_next else _NONE

    communicator.config = copy.copy(config)
    communicator.config.variable_seq_lengths = True
    communicator._communicate_shapes = known_shapes
    try:
        yield arguments
    finally:
        del communicator._communicate_shapes
        communicator.config = config
    assert not [*from_prev, *from_next], "the schedule received less than it computes"


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what :func:`shapes_from` could not use in a later step; any rank, no communication.

    Raises:
        ReGateError: the schedule's arguments have a communicator of another kind, or shapes of another form; on every
            rank alike.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    communicator, given = arguments.get("p2p_communicator"), None
    if communicator is not None and not isinstance(communicator, P2PCommunicator):
        given = f"a {type(communicator).__name__}"
    elif arguments.get("adjust_tensor_shapes_fn") is not None:
        given = "adjust_tensor_shapes_fn"
    if given:
        raise refuse(
            "pipeline communication",
            given=given,
            allowed="a P2PCommunicator that sends the decoder's hidden states alone",
            change="the host's schedule, or --pipeline-model-parallel-size to 1",
        )


def receive_order(
    num_microbatches: int, num_chunks: int, group_size: int, *, is_first: bool, is_last: bool
) -> tuple[list[int], list[int]]:
    """The microbatches whose states, and whose gradients, this stage receives, each in order; pure.

    Messages between two stages arrive in the order in which they are sent, which is the order of Megatron's table of
    microbatches and chunks; backward, chunks count from the end. What the first chunk of all computes from, and what
    the last chunk of all is given a gradient of, comes from no stage.

    Args:
        group_size: microbatches that a chunk runs before the next chunk does.
        is_first, is_last: whether this is the first, the last stage.
    """
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(num_microbatches, num_chunks, group_size)
    later = [index for index, chunk in table if chunk > 0]
    every = [index for index, _ in table]
    return later if is_first else every, later if is_last else every


def _shape(plan: ShardedPlan, layout: Layout, hidden_size: int) -> list[int]:
    rows, length = plan.keep_idx_BK.shape
    return [length // (layout.cp_size * layout.sp_size), rows, hidden_size]


def _defaults(model: Any) -> dict[str, Any]:
    """The communicator and groups that the schedules make where they are given none; they take both or neither."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config

    config = get_model_config(model[0] if isinstance(model, list) else model)
    stages = parallel_state.get_pipeline_model_parallel_group()
    build = getattr(schedules, "_build_default_pg_collection", None)
    if build is None:  # before 0.19
        names = ["tp", "cp", "embd", "pos_embd", "pp", "dp_cp", "tp_dp_cp"]
        groups = ProcessGroupCollection.use_mpu_process_groups(names)
    else:
        groups = build()
    return {"p2p_communicator": P2PCommunicator(stages, config), "pg_collection": groups}
