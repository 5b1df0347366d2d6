"""What a dense decoder is, in neither framework's words."""

from __future__ import annotations

from dataclasses import dataclass

from regate_megatron.checkpoints.families import Family


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape and the constants of one language model.

    Attributes:
        num_groups: key-value heads (Megatron: query groups).
        head_dim: width of one head; need not be ``hidden_size / num_heads``.
        vocab_size: rows of the word embedding without Megatron's padding.
        rope_interpolation: positions are divided by this; None: they are not.
        rope_llama3_factor: factor of Llama 3's frequency scaling, other constants as in Llama 3.1; None: unscaled.
        max_positions: longest sequence for which the two frameworks compute the same.
        tied: whether the output layer is the word embedding.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_base: int
    rope_interpolation: int | None = None
    rope_llama3_factor: float | None = None
    max_positions: int
    tied: bool

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_groups
