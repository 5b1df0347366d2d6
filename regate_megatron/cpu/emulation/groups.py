"""Every process group is gloo.

Patched: ``init_process_group``, ``new_group``, ``all_to_all_single``, ``all_gather`` and ``reduce_scatter`` of
``torch.distributed``, and ``ProcessGroupGloo.__init__``.
"""

from __future__ import annotations

import functools
import inspect
import os
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
    torch.distributed.ProcessGroupGloo.__init__ = _on_one_device(torch.distributed.ProcessGroupGloo.__init__)


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


def _on_one_device(init: Callable) -> Callable:
    """A device of gloo's is a thread that wakes a hundred times a second, and each of Megatron's sixty groups would
    have one: half of what four ranks on two cores did. All groups of a process share one here."""

    @functools.wraps(init)
    def wrapper(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        if args or kwargs.keys() != {"timeout"}:  # somebody has options of their own
            return init(self, store, rank, size, *args, **kwargs)
        options = torch.distributed.ProcessGroupGloo._Options()
        options._timeout, options._devices = kwargs["timeout"], [_device(os.getpid())]
        return init(self, store, rank, size, options)

    return wrapper


@functools.cache
def _device(process: int) -> Any:
    """The device of one process: threads do not survive a fork."""
    return torch.distributed.ProcessGroupGloo.create_default_device()


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
