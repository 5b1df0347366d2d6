"""What a dense decoder is, in neither framework's words, and the families that can be converted, as a table.

All of them are decoders with RoPE, RMSNorm, grouped-query attention and a gated SiLU MLP; they differ in two switches.
A configuration may leave out what equals its family's default, so the defaults are part of the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of causal language models.

    Attributes:
        name: its ``model_type``.
        architecture: the class in transformers.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalised per head.
        defaults: what its configuration means where it is silent; no entry: see ``hf_config``.
    """

    name: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)


_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_QWEN_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}

LLAMA = Family(name="llama", architecture="LlamaForCausalLM", defaults=_DEFAULTS)
MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults=_DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
QWEN2 = Family(name="qwen2", architecture="Qwen2ForCausalLM", qkv_bias=True, defaults=_DEFAULTS | _QWEN)
QWEN3 = Family(
    name="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True, defaults=_DEFAULTS | _QWEN | {"head_dim": 128}
)
FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# Text models inside vision-language models, under their own model_type: the family, and other defaults.
TEXT_MODELS = {
    "qwen2_vl": (QWEN2, _QWEN_VL),
    "qwen2_vl_text": (QWEN2, _QWEN_VL),
    "qwen2_5_vl": (QWEN2, _QWEN_VL),
    "qwen2_5_vl_text": (QWEN2, _QWEN_VL),
}


def allowed_families() -> str:
    """The names of all families, for a refusal."""
    return ", ".join(FAMILIES)


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
