"""Which tensors of a Hugging Face model make up which tensor of Megatron's GPT, as a table, and how.

Megatron's names are those its Transformer Engine spec stores (the local GPT spec stores the same): norms lie under the
linear layer they precede. Megatron stacks the layers of one kind in the first dimension of one stored tensor.

Shapes: H hidden, D head, Q query heads, G groups, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from regate_megatron.checkpoints.families import Architecture
from regate_megatron.teacher.weights import EMBEDDING

LAYERS = "decoder.layers."
OUTPUT = "output_layer.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron.

    Attributes:
        megatron: its stored name.
        sources: the Hugging Face names, ``{}`` for the number of the layer.
        merge: how they become Megatron's tensor: "copy", "token", "qkv", "gate_up" or "vocabulary".
        shapes: the shapes of the sources, as a function of the architecture.
    """

    megatron: str
    sources: tuple[str, ...]
    merge: str
    shapes: Callable[[Architecture], tuple[tuple[int, ...], ...]]

    @property
    def per_layer(self) -> bool:
        """Whether there is one for each decoder layer."""
        return LAYERS in self.megatron


class InFolder:
    """Where the tensors of a table are in a Hugging Face folder, for a model that says how a name is ``stored``."""

    def sources(self, rule: Rule, layer: int | None) -> list[str]:
        """Names in the folder of a rule's tensors."""
        return [self.stored(name.format(layer)) for name in rule.sources]

    def layers(self, rule: Rule) -> list[int | None]:
        """The layers a rule applies to; [None] for what is there once."""
        return [*range(self.architecture.num_layers)] if rule.per_layer else [None]


def _hidden(a: Architecture) -> tuple[tuple[int, ...], ...]:
    return ((a.hidden_size,),)


def _vocabulary(a: Architecture) -> tuple[tuple[int, ...], ...]:
    return ((a.vocab_size, a.hidden_size),)


def _qkv_rows(a: Architecture) -> tuple[int, int, int]:
    return a.num_heads * a.head_dim, a.num_groups * a.head_dim, a.num_groups * a.head_dim


_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_QKV = tuple(f"{_ATTENTION}{part}_proj" for part in "qkv")

RULES = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), "vocabulary", _vocabulary),
    Rule(
        f"{LAYERS}self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{}.input_layernorm.weight",),
        "copy",
        _hidden,
    ),
    Rule(
        f"{LAYERS}self_attention.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _QKV),
        "qkv",
        lambda a: tuple((rows, a.hidden_size) for rows in _qkv_rows(a)),
    ),
    Rule(
        f"{LAYERS}self_attention.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        "qkv",
        lambda a: tuple((rows,) for rows in _qkv_rows(a)),
    ),
    Rule(
        f"{LAYERS}self_attention.q_layernorm.weight",
        (f"{_ATTENTION}q_norm.weight",),
        "copy",
        lambda a: ((a.head_dim,),),
    ),
    Rule(
        f"{LAYERS}self_attention.k_layernorm.weight",
        (f"{_ATTENTION}k_norm.weight",),
        "copy",
        lambda a: ((a.head_dim,),),
    ),
    Rule(
        f"{LAYERS}self_attention.linear_proj.weight",
        (f"{_ATTENTION}o_proj.weight",),
        "copy",
        lambda a: ((a.hidden_size, a.num_heads * a.head_dim),),
    ),
    Rule(
        f"{LAYERS}mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{}.post_attention_layernorm.weight",),
        "copy",
        _hidden,
    ),
    Rule(
        f"{LAYERS}mlp.linear_fc1.weight",
        (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
        "gate_up",
        lambda a: ((a.ffn_hidden_size, a.hidden_size),) * 2,
    ),
    Rule(
        f"{LAYERS}mlp.linear_fc2.weight",
        (f"{_MLP}down_proj.weight",),
        "copy",
        lambda a: ((a.hidden_size, a.ffn_hidden_size),),
    ),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "copy", _hidden),
    Rule(OUTPUT, (LM_HEAD,), "vocabulary", _vocabulary),
)
_ONLY_WITH = {
    f"{LAYERS}self_attention.linear_qkv.bias": lambda a: a.family.qkv_bias,
    f"{LAYERS}self_attention.q_layernorm.weight": lambda a: a.family.qk_norm,
    f"{LAYERS}self_attention.k_layernorm.weight": lambda a: a.family.qk_norm,
    OUTPUT: lambda a: not a.tied,
}


def rules_for(architecture: Architecture) -> list[Rule]:
    """The rows of the table that apply."""
    return [rule for rule in RULES if _ONLY_WITH.get(rule.megatron, lambda a: True)(architecture)]


def merged_shape(rule: Rule, architecture: Architecture, padded_vocab: int) -> tuple[int, ...]:
    """Shape of Megatron's tensor, of one layer where there are several."""
    shapes = rule.shapes(architecture)
    if rule.merge == "token":
        return (1, 1, *shapes[0])
    rows = padded_vocab if rule.merge == "vocabulary" else sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])


def merge(rule: Rule, parts: Sequence[torch.Tensor], architecture: Architecture, padded_vocab: int) -> torch.Tensor:
    """Megatron's tensor from the Hugging Face ones, which are left alone.

    ``qkv``: [QD, ...], [GD, ...], [GD, ...] -> [G(Q/G + 2)D, ...], for each group its queries, its key, its value.
    ``gate_up``: one after the other. ``vocabulary``: rows of zeros are added up to the padded size. ``token``: [H] ->
    [1, 1, H].
    """
    if rule.merge == "qkv":
        groups = [part.unflatten(0, (architecture.num_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if rule.merge == "gate_up":
        return torch.cat(list(parts))
    (part,) = parts
    if rule.merge == "vocabulary" and padded_vocab > len(part):
        return torch.cat([part, part.new_zeros(padded_vocab - len(part), *part.shape[1:])])
    return part[None, None] if rule.merge == "token" else part


def split(rule: Rule, merged: torch.Tensor, architecture: Architecture) -> list[torch.Tensor]:
    """The inverse of :func:`merge`; contiguous tensors."""
    if rule.merge == "qkv":
        grouped = merged.unflatten(0, (architecture.num_groups, -1))
        sizes = [architecture.heads_per_group * architecture.head_dim, architecture.head_dim, architecture.head_dim]
        return [part.flatten(0, 1).contiguous() for part in grouped.split(sizes, dim=1)]
    if rule.merge == "gate_up":
        return [part.contiguous() for part in merged.chunk(2)]
    if rule.merge == "vocabulary":
        return [merged[: architecture.vocab_size].contiguous()]
    if rule.merge == "token":
        return [merged[0, 0].contiguous()]
    return [merged.contiguous()]
