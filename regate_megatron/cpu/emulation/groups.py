"""Every process group is gloo. Patched in ``torch.distributed``: ``init_process_group``, ``new_group``,
``all_to_all_single``, ``all_gather`` and ``reduce_scatter``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch.distributed import distributed_c10d

_KEPT_BACKENDS = ("fake", "mpi")


def install() -> None:
    """Replace the functions where torch itself and its users look them up."""
    wrappers = {name: _on_gloo(getattr(distributed_c10d, name)) for name in ("init_process_group", "new_group")}
    wrappers["all_to_all_single"] = _with_lists(distributed_c10d.all_to_all_single)
    wrappers["all_gather"] = _all_gather_of_any_sizes(distributed_c10d.all_gather)
    wrappers["reduce_scatter"] = _reduce_scatter_of_any_sizes(distributed_c10d.reduce_scatter)
    for name, wrapper in wrappers.items():
        for module in (distributed_c10d, torch.distributed):
            setattr(module, name, wrapper)


def _on_gloo(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("backend") not in _KEPT_BACKENDS:
            bound.arguments["backend"] = "gloo"
            bound.arguments.pop("pg_options", None)  # made for NCCL
        bound.arguments.pop("device_id", None)
        return function(*bound.args, **bound.kwargs)

    return wrapper


def _with_lists(function: Callable) -> Callable:
    """Split sizes may be tensors: Megatron makes lists of them on their way from the GPU, and here they are there."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensors, splits = args[:2], args[2:4]  # output, input, output splits, input splits
        splits = tuple(one.tolist() if torch.is_tensor(one) else one for one in splits)
        named = {
            name: value.tolist() if name.endswith("_split_sizes") and torch.is_tensor(value) else value
            for name, value in kwargs.items()
        }
        return function(*tensors, *splits, *args[4:], **named)

    return wrapper


def _all_gather_of_any_sizes(function: Callable) -> Callable:
    """Ranks may give parts of different sizes, as NCCL allows: each part is then broadcast."""

    @functools.wraps(function)
    def wrapper(tensor_list: list, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        if async_op or len({part.shape for part in tensor_list}) == 1:
            return function(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[distributed_c10d.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            if part.numel():
                distributed_c10d.broadcast(part, group=group, group_src=rank)
        return None

    return wrapper


def _reduce_scatter_of_any_sizes(function: Callable) -> Callable:
    """The same the other way round: each part is reduced to its rank."""

    @functools.wraps(function)
    def wrapper(output: Any, input_list: list, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        op = distributed_c10d.ReduceOp.SUM if op is None else op
        if async_op or len({part.shape for part in input_list}) == 1:
            return function(output, input_list, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(input_list):
            part = part.clone()
            if part.numel():
                distributed_c10d.reduce(part, op=op, group=group, group_dst=rank)
            if rank == distributed_c10d.get_rank(group):
                output.copy_(part)
        return None

    return wrapper
