"""Attributes of module instances that say something else for a while, and then what they said before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

_ABSENT = object()


class Switch(NamedTuple):
    """An attribute of one instance, and its value while it is off."""

    module: nn.Module
    name: str
    off: Any


@contextmanager
def switched_off(switches: Iterable[Switch]) -> Iterator[None]:
    """These attributes off, and as they were afterwards, however it ends; one that only the class has is so again."""
    switches = tuple(switches)
    were = [vars(module).get(name, _ABSENT) for module, name, _ in switches]
    try:
        for module, name, off in switches:
            vars(module)[name] = off
        yield
    finally:
        for (module, name, _), was in zip(switches, were, strict=True):
            if was is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = was
