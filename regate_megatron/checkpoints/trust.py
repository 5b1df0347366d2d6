"""Classes that weights-only unpickling may build."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allowed_classes(classes: Iterable[type]) -> Iterator[None]:
    """Allow ``classes`` inside the block, and leave torch's list as it was.

    ``torch.serialization.safe_globals`` alone would at its end forbid what had been allowed before it, by Megatron say.
    """
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([kind for kind in classes if kind not in before]):
        yield


def megatron_classes() -> list[type]:
    """Megatron's own list where it is installed (argument enums, random states); argparse's namespace otherwise."""
    try:
        from megatron.core.safe_globals import SAFE_GLOBALS
    except ImportError:
        return [Namespace]
    return SAFE_GLOBALS


def is_distrust(error: Exception) -> bool:
    """Whether weights-only unpickling ended at a class that is not allowed; else the file is damaged."""
    return "global" in str(error).lower()
