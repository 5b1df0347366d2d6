"""How much work a step is, by formula: multiply-adds count as two operations, backward twice as much as forward.

Of a layer on K positions per row: ``2 · rows · K · weights`` in its linear layers (QKV, projection, MLP) and
``4 · rows · H · K²`` in attention: the whole square, because Megatron's local CPU attention computes all of it and
masks. Of the LM head: ``2 · rows · K · H · V``. Of the vision tower: its layers on the patches and its projector, the
same in every step. Softmax, norms, rotary, embeddings and copies are not counted.
"""

from __future__ import annotations

from typing import Any

from benchmarks.models import Size, decoder_of

_FORWARD_AND_BACKWARD = 3


def layer_weights(layer: Any) -> int:
    """Weights of a layer's linear layers."""
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)


def layer_work(rows: int, positions: int, hidden: int, weights: int) -> float:
    """One layer, forward and backward."""
    return _FORWARD_AND_BACKWARD * rows * (2 * positions * weights + 4 * hidden * positions**2)


def head_work(size: Size, positions: int) -> float:
    """The LM head, forward and backward."""
    return _FORWARD_AND_BACKWARD * 2 * size.rows * positions * size.hidden * size.vocab


class Work:
    """Operations of one step of a model."""

    def __init__(self, size: Size, model: Any) -> None:
        self.size = size
        self._weights = layer_weights(decoder_of(model).layers[0])
        self._vision = self._frozen_vision = 0.0
        if size.image:
            layers = model.vision_model.decoder.layers
            rows, patches = size.rows * size.frames, size.image // size.frames
            self._vision = sum(layer_work(rows, patches, size.hidden, layer_weights(one)) for one in layers)
            projector = _FORWARD_AND_BACKWARD * 2 * size.rows * size.image * layer_weights(model.vision_projection)
            self._frozen_vision = self._vision / _FORWARD_AND_BACKWARD + projector
            self._vision += projector

    def decoder(self, length: int, dense_layers: int) -> float:
        """The decoder with its first layers on all positions and the others on ``length`` per row."""
        size = self.size

        def one(positions: int) -> float:
            return layer_work(size.rows, positions, size.hidden, self._weights)

        return dense_layers * one(size.length) + (size.layers - dense_layers) * one(length)

    @property
    def vision(self) -> float:
        """The vision tower and its projector."""
        return self._vision

    def vision_share(self, length: int, dense_layers: int, *, is_frozen: bool = False) -> float:
        """The share of a step that the vision tower and its projector are, the tower frozen or trained."""
        vision = self._frozen_vision if is_frozen else self._vision
        return vision / (self.step(length, dense_layers) - self._vision + vision)

    def step(self, length: int, dense_layers: int) -> float:
        """Decoder, LM head and vision tower."""
        return self.decoder(length, dense_layers) + head_work(self.size, length) + self._vision
