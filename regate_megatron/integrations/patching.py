"""Functions of a host's modules, wrapped where the host looks them up late, and put back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

_MARK = "_regate"


def patch(module: ModuleType, wrappers: Mapping[str, Callable[..., Any]], caller: Callable[..., Any]) -> None:
    """Replace functions of ``module`` by wrappers that :func:`unpatch` knows.

    Args:
        wrappers: by name, what makes a wrapper of the function that stands there.
        caller: the host's function that looks these names up.
    """
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


def missing(module: ModuleType, names: Iterable[str]) -> list[str]:
    """The names that are no functions of ``module``, in this version of it."""
    return [name for name in names if not callable(getattr(module, name, None))]
