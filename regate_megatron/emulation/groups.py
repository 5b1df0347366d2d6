"""Every process group is gloo. Patched: ``init_process_group`` and ``new_group`` of ``torch.distributed``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

_KEPT_BACKENDS = ("fake", "mpi")


def install() -> None:
    """Replace both functions where torch itself and its users look them up."""
    for name in ("init_process_group", "new_group"):
        wrapper = _on_gloo(getattr(distributed_c10d, name))
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
