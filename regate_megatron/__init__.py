"""ReGATE (Reference-Guided Adaptive Token Elision) for Megatron-style training.

A frozen text-only teacher gives every answer token a reference loss, which ranks the answer tokens (in the paper, arXiv
2507.21420, together with a running average of the student's own loss); in sparse steps only the best-ranked go through
the decoder, and of pictures and clips only as many positions as are asked for.
Importing this package changes nothing: everything happens in :func:`attach` and :func:`wrap_forward_backward`, or in
the launcher ``torchrun … -m regate_megatron SCRIPT … --regate``.
"""

from typing import TYPE_CHECKING, Any

from regate_megatron.config import ReGateConfig
from regate_megatron.errors import ReGateError

if TYPE_CHECKING:
    from regate_megatron.api import (
        attach,
        describe,
        detach,
        load_state,
        save_state,
        step_done,
        wrap_forward_backward,
    )

__version__ = "0.1.0"
__all__ = [
    "ReGateConfig",
    "ReGateError",
    "attach",
    "describe",
    "detach",
    "load_state",
    "save_state",
    "step_done",
    "wrap_forward_backward",
]


def __getattr__(name: str) -> Any:
    """Load the parts that need Megatron only when they are asked for."""
    if name in __all__:
        from regate_megatron import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
