"""Megatron's versions, and the models inside its wrappers."""

from __future__ import annotations

import contextlib
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


def versions() -> str:
    """The versions that matter, for the log line. Megatron's is that of the copy in use, often no installed package."""
    import megatron.core
    import torch

    found = [f"torch {torch.__version__}", f"megatron-core {megatron.core.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        found.append(f"transformer-engine {metadata.version('transformer-engine')}")
    return ", ".join(found)
