"""Megatron's versions, and the models inside its wrappers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from regate_megatron.errors import ReGateError, refuse

MEGATRON_CORE = "0.17 to 0.20"


def unwrap(module: Any) -> Any:
    """The framework's model below DDP, Float16Module and the like."""
    while hasattr(module, "module"):
        module = module.module
    return module


def language_model_of(model: Any) -> Any:
    """The language model inside a multimodal model, or the model itself."""
    return getattr(model, "language_model", None) or model


@dataclass(frozen=True)
class AdapterKind:
    """How a framework's adapters (LoRA and the like) look in a model.

    Attributes:
        switch: the attribute of an adapted layer that switches its adapters.
        off: what it says when they are off.
        parts: what names of an adapter's tensors have, and no other's.
        wraps: what it puts into the names of the layer's own tensors.
    """

    switch: str
    off: Any
    parts: tuple[str, ...]
    wraps: str | None = None


ADAPTERS = (
    AdapterKind("_adapter_enabled", False, ("adapter",)),  # Megatron-Bridge
    # peft: its "disabled" is not asked by mcore-bridge's routers, the list of those that are active is.
    AdapterKind("_active_adapter", (), ("lora_A", "lora_B"), "base_layer"),
)


def adapters_of(model: Any) -> list[tuple[Any, AdapterKind]]:
    """The layers of a model whose adapters can be switched off; known by their switch."""
    return [(one, kind) for one in model.modules() for kind in ADAPTERS if hasattr(one, kind.switch)]


def is_adapter(name: str) -> bool:
    """Whether a parameter or a tensor of this name is an adapter's, not its base's."""
    return any(part in name.split(".") for kind in ADAPTERS for part in kind.parts)


def base_name(name: str) -> str:
    """The name of a base's tensor as it is without adapters."""
    wraps = [kind.wraps for kind in ADAPTERS]
    return ".".join(part for part in name.split(".") if part not in wraps)


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


def numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_known_megatron(version: str) -> bool:
    """Whether this version of megatron-core was tried."""
    return (0, 17) <= numbers(version) < (0, 21)


def find_megatron() -> tuple[str, Path] | None:
    """Version and folder of what ``import megatron.core`` would find (a checkout on the path comes before a wheel),
    without importing it; None where there is none that tells its version."""
    spec = util.find_spec("megatron")
    for folder in spec.submodule_search_locations or () if spec else ():
        info = Path(folder) / "core" / "package_info.py"
        if info.is_file():
            said = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", info.read_text(), re.M))
            return (".".join(said.values()), Path(folder)) if said else None
    return None


def require_megatron() -> None:
    """Refuse a Megatron that our own imports would fail in. Without communication.

    Raises:
        ReGateError: on every rank, as all have the same path.
    """
    found = find_megatron()
    if found is not None and not is_known_megatron(found[0]):
        error = refuse(
            "megatron-core",
            given=f"{found[0]} in {found[1]}",
            allowed=MEGATRON_CORE,
            change="to a checkout or wheel of these versions; what lies first on the path is taken",
        )
        raise ReGateError(str(error), everywhere=True)
