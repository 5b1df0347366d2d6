"""The work of a training step by formula, and how much of what is left out became time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations of one training step, two per multiply-add; backward counts twice the forward.

    A layer on K positions per row: ``2 · B · K · weights`` in its matrices and ``2 · B · N·D · K²`` in causal attention
    (the lower half of two products; a flash kernel computes no more, and recomputation in its backward is not counted).
    LM head: ``2 · B · K · H · V``. Embedding, norms, rotary, softmax and loss are not counted.
    """

    rows: int
    num_layers: int
    weights_per_layer: int
    attention_width: int
    head_weights: int

    def layer(self, positions: int) -> float:
        linear = 2 * positions * self.weights_per_layer
        return 3 * self.rows * (linear + 2 * self.attention_width * positions**2)

    def decoder(self, length: int, short: int, dense_layers: int) -> float:
        """``dense_layers`` on all positions, the others on ``short``."""
        return dense_layers * self.layer(length) + (self.num_layers - dense_layers) * self.layer(short)

    def step(self, length: int, short: int, dense_layers: int) -> float:
        """The decoder and the LM head, which runs short."""
        return self.decoder(length, short, dense_layers) + 3 * self.rows * 2 * short * self.head_weights


def conv(sparse_time: float, dense_time: float, sparse_work: float, dense_work: float) -> float:
    """The share of the work left out that became time saved."""
    return (1 - sparse_time / dense_time) / (1 - sparse_work / dense_work)
