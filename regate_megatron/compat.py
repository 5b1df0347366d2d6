"""Megatron's versions, and the models inside its wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from importlib import metadata
from typing import Any

MEGATRON_CORE = "0.17 to 0.20"


def unwrap(module: Any) -> Any:
    """The framework's model below DDP, Float16Module and the like."""
    while hasattr(module, "module"):
        module = module.module
    return module


def language_model_of(model: Any) -> Any:
    """The GPTModel inside a multimodal model, or the model itself."""
    return getattr(model, "language_model", None) or model


def qualified_name(kind: type) -> str:
    """A class by the module that defines it, such as ``megatron.core.models.gpt.gpt_model.GPTModel``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def known_as(instance: Any, names: Container[str]) -> str | None:
    """The name by which an object's class is known among module-qualified ``names``; None where it is not.

    A class of its own below a known one counts as that one as long as it changes nothing that runs: only how it is
    built and how its state is saved. One that has its own ``forward``, say, is another model.
    """
    order = type(instance).__mro__
    for depth, kind in enumerate(order):
        if qualified_name(kind) in names:
            own = {name for below in order[:depth] for name, value in vars(below).items() if _runs(name, value)}
            return None if any(hasattr(kind, name) for name in own) else qualified_name(kind)
    return None


def is_one_of(instance: Any, names: Container[str]) -> bool:
    """Whether :func:`known_as` knows the object's class."""
    return known_as(instance, names) is not None


# What a class may define anew and still run as the known one does.
_BUILT_OR_SAVED = {
    *("sharded_state_dict", "state_dict", "state_dict_for_save_checkpoint", "load_state_dict", "extra_repr", "freeze"),
    *("_load_from_state_dict", "_save_to_state_dict"),
}


def _runs(name: str, value: Any) -> bool:
    if name in _BUILT_OR_SAVED or (name.startswith("__") and name != "__call__"):
        return False
    return callable(value) or isinstance(value, (property, classmethod, staticmethod))


def versions() -> str:
    """The versions that matter, for the log line. Megatron's is that of the copy in use, often no installed package."""
    import megatron.core
    import torch

    found = [f"torch {torch.__version__}", f"megatron-core {megatron.core.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        found.append(f"transformer-engine {metadata.version('transformer-engine')}")
    return ", ".join(found)
