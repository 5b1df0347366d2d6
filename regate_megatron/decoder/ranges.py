"""A view of a transformer block that has some of its layers."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import Tensor


class LayerRange:
    """Some layers of a ``TransformerBlock``; every other attribute is the block's own.

    The block's ``forward`` runs on it unbound, and so does recompute, which keeps it in its closure. Methods that
    forward calls run on it, too: core 0.17 recomputes in one, which would find all layers on the block.

    Args:
        start, stop: which of the block's layers.
        takes_input: whether hidden states come as an argument, not from the previous stage.
        is_end: whether the block's final norm belongs to the range.
    """

    def __init__(self, block: Any, start: int, stop: int, *, takes_input: bool, is_end: bool) -> None:
        self._block = block
        self.layers = list(block.layers)[start:stop]
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.pre_process = takes_input
        self.final_layernorm = getattr(block, "final_layernorm", None) if is_end else None
        self.config = block.config
        if start and block.config.recompute_method == "block":
            # "block" recomputes the first N layers of a stage: the dense range has used up some of them.
            self.config = copy.copy(block.config)
            self.config.recompute_num_layers = max(0, block.config.recompute_num_layers - start)

    @property
    def __class__(self) -> type:
        """The block's, as ``super()`` asks for it in a forward of a block below another."""
        return type(self._block)

    def with_padding(self, padding_mask: Tensor) -> LayerRange:
        """The same layers, told where their input is padding: for a block whose forward has no such argument.

        It is a view of its own for every microbatch, which recompute keeps.
        """
        view = object.__new__(type(self))
        vars(view).update(vars(self), layers=[_PaddedLayer(layer, padding_mask) for layer in self.layers])
        return view

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._block, name)
        is_own_method = isinstance(found, MethodType) and found.__self__ is self._block
        return MethodType(found.__func__, self) if is_own_method else found


class _PaddedLayer:
    """A layer that gets a ``padding_mask``, whatever its block passes on."""

    def __init__(self, layer: Any, padding_mask: Tensor) -> None:
        self._layer, self._padding_mask = layer, padding_mask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._layer(*args, padding_mask=self._padding_mask, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
