"""Functions of a host's modules, wrapped where the host looks them up late, and put back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from regate_megatron import compat
from regate_megatron.errors import refuse

_MARK = "_regate"


def patch(*rooms: tuple[ModuleType, Mapping[str, Callable[..., Any]], Callable[..., Any]], allowed: str) -> None:
    """Replace functions by wrappers that :func:`unpatch` knows: all of them, or none.

    Args:
        rooms: a module; by name, what makes a wrapper of its function; and the host's function that looks them up.
        allowed: the versions of the host that have them, for the refusal.

    Raises:
        ReGateError: this version of the host lacks one of them.
    """
    absent = [name for module, names, _ in rooms for name in names if not callable(getattr(module, name, None))]
    if absent:
        given = f"{compat.versions()} without {', '.join(absent)}"
        raise refuse(rooms[0][0].__name__, given=given, allowed=allowed, change="the version")
    for module, wrappers, caller in rooms:
        for name, wrap in wrappers.items():
            inner = getattr(module, name)
            wrapper = functools.wraps(inner)(wrap(inner))
            setattr(wrapper, _MARK, True)
            setattr(module, name, wrapper)
            # The caller must read its globals from the module patched here, or the patch would be for nobody.
            assert inspect.unwrap(caller).__globals__[name] is wrapper, f"{name} is bound elsewhere"


def unpatch(*modules: ModuleType) -> None:
    """Put the original functions back."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if is_patched(value):
                setattr(module, name, value.__wrapped__)


def is_patched(function: Any) -> bool:
    """Whether this is a wrapper made here."""
    return getattr(function, _MARK, False) is True
