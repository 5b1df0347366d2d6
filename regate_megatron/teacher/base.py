"""A student with adapters: its frozen base, adapters switched off, is the teacher. There is no second copy.

Only adapters learn, so the base stays what it was when the run began, and comes back with every resumed run. Between
two steps the student's own modules run as the teacher: hooks off, adapters off, in evaluation mode, without gradients
and without the callbacks of the training loop; then all of it is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from regate_megatron.compat import adapters_of
from regate_megatron.decoder import Hooks
from regate_megatron.teacher.rows import TeacherRows
from regate_megatron.teacher.run import TeacherRun

_CALLBACKS = ("timers", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func")


class BaseRun:
    """The frozen base of the student, run as :class:`TeacherRun` runs a teacher of its own.

    Args:
        chunks: the student's language-model chunks.
        hooks: what is attached to them.
    """

    def __init__(self, chunks: Sequence[Any], hooks: Hooks) -> None:
        self.chunks, self._hooks = list(chunks), hooks

    def detach(self) -> None:
        """Nothing is left on the student between two calls."""

    def __call__(self, request: TeacherRows, micro_batch_size: int) -> list[Tensor]:
        """See :meth:`TeacherRun.__call__`."""
        self._hooks.detach()
        try:
            with _as_base(self.chunks):
                run = TeacherRun(self.chunks)
                try:
                    return run(request, micro_batch_size)
                finally:
                    run.detach()
        finally:
            self._hooks.attach()


@contextmanager
def _as_base(chunks: Sequence[Any]) -> Iterator[None]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    training = [module for module in modules if module.training]
    switched = [(one, kind, getattr(one, kind.switch)) for chunk in chunks for one, kind in adapters_of(chunk)]
    configs = {id(chunk.config): chunk.config for chunk in chunks}.values()
    callbacks = [(config, name, getattr(config, name, None)) for config in configs for name in _CALLBACKS]
    try:
        for module in training:
            module.training = False
        for one, kind, _ in switched:
            setattr(one, kind.switch, kind.off)
        for config, name, _ in callbacks:
            setattr(config, name, None)
        yield
    finally:
        for config, name, value in callbacks:
            setattr(config, name, value)
        for one, kind, was in switched:
            setattr(one, kind.switch, was)
        for module in training:
            module.training = True
