"""HybridModel's decoder: a stack in which attention, MLP and expert layers are entries of their own.

Everything :class:`DecoderHook` needs of it is that its forward runs over a range of its layers; the stack names the
parts that decide this differently from ``TransformerBlock``. Layers are counted as the framework counts them:
``--regate-dense-layers 2`` in a pattern ``*-*-`` is one attention and one MLP.
"""

from __future__ import annotations

from typing import Any

from regate_megatron.compat import is_one_of
from regate_megatron.decoder.ranges import LayerRange
from regate_megatron.support.decoder import HYBRID_STACK


class HybridRange(LayerRange):
    """A view of a ``HybridStack`` that has some of its layers."""

    def __init__(self, block: Any, start: int, stop: int, *, takes_input: bool, is_end: bool) -> None:
        super().__init__(block, start, stop, takes_input=takes_input, is_end=is_end)
        self.post_layer_norm = block.post_layer_norm and is_end


def is_hybrid(block: Any) -> bool:
    """Whether a decoder is a ``HybridStack``."""
    return is_one_of(block, (HYBRID_STACK,))
