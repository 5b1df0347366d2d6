"""Hugging Face ``config.json`` <-> :class:`Architecture`; refuses by name what Megatron's GPT cannot express."""

from __future__ import annotations

import math
from typing import Any

from regate_megatron.checkpoints.families import FAMILIES, TEXT_MODELS, Architecture, Family, allowed_families
from regate_megatron.errors import refuse

# Megatron fixes these constants of Llama 3's scaling; only the factor is an option (--rope-scaling-factor).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_CONFIG = "config.json"


_COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_COUNTS += ("num_key_value_heads", "head_dim", "max_position_embeddings")


def check_numbers(config: dict[str, Any], counts: tuple[str, ...], reals: tuple[str, ...]) -> None:
    """Refuse what are no numbers above zero, among the values that are there.

    Raises:
        ReGateError: one of ``counts`` is no whole number, or one of ``reals`` no number, above 0.
    """
    for names, kinds, allowed in ((counts, int, "a whole number above 0"), (reals, int | float, "a number above 0")):
        for name in names:
            found = config.get(name, 1)
            if not isinstance(found, kinds) or isinstance(found, bool) or not found > 0:
                raise _refuse(f"{name} {found!r}", allowed)


def family_of(config: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a text configuration, and the configuration with the family's defaults filled in.

    Raises:
        ReGateError: not one of the families.
    """
    kind = config.get("model_type")
    family, other = TEXT_MODELS.get(kind) or (FAMILIES.get(kind), {})
    if family is None:
        raise refuse(_CONFIG, given=f"model_type {kind!r}", allowed=f"a dense {allowed_families()}", change="the model")
    return family, family.defaults | other | {key: value for key, value in config.items() if value is not None}


def from_config(config: dict[str, Any]) -> Architecture:
    """What a text configuration describes.

    Raises:
        ReGateError: another family, or a variant of one that Megatron's GPT cannot express.
    """
    family, full = family_of(config)
    check_numbers(full, _COUNTS, ("rms_norm_eps", "rope_theta"))
    for name, value in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", family.qkv_bias)):
        if full.get(name, value) != value:
            raise _refuse(f"{name} {full[name]!r}", f"{value!r}")
    if full.get("quantization_config"):
        raise _refuse("quantized weights", "weights in bf16, fp16 or fp32", "the model to its unquantized release")
    heads = full["num_attention_heads"]
    groups = full.get("num_key_value_heads", heads)
    if heads % groups:
        raise _refuse(f"{heads} heads in {groups} groups", "a number of heads that is a multiple of the groups")
    rope = _rope(full)
    return Architecture(
        family=family,
        num_layers=full["num_hidden_layers"],
        hidden_size=full["hidden_size"],
        ffn_hidden_size=full["intermediate_size"],
        num_heads=heads,
        num_groups=groups,
        head_dim=full.get("head_dim", full["hidden_size"] // heads),
        vocab_size=full["vocab_size"],
        norm_eps=full["rms_norm_eps"],
        max_positions=min(full["max_position_embeddings"], _window(config, full)),
        tied=bool(full["tie_word_embeddings"]),
        **rope,
    )


def to_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """A configuration that transformers 4 and 5 read; ``dtype`` as in "bfloat16"."""
    family = architecture.family
    scaling: dict[str, Any] = {"rope_type": "default"}
    if architecture.rope_interpolation:
        scaling = {"rope_type": "linear", "factor": float(architecture.rope_interpolation)}
    if architecture.rope_llama3_factor:
        scaling = {"rope_type": "llama3", "factor": architecture.rope_llama3_factor, **_LLAMA3}
    config = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_groups,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_positions,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": float(architecture.rope_base),
        "rope_parameters": {"rope_theta": float(architecture.rope_base), **scaling},
        "tie_word_embeddings": architecture.tied,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if len(scaling) > 1:
        config["rope_scaling"] = scaling
    if family.name == "mistral":
        config["sliding_window"] = None
    return config


def text_config(whole: dict[str, Any], *, has_head: bool) -> dict[str, Any]:
    """The language model's part of a configuration: itself, or what a vision-language model nests in it.

    A vision-language model says twice whether its embeddings are tied, not always the same; whether there is an output
    layer of its own decides then.
    """
    nested = next((whole[name] for name in ("text_config", "llm_config") if isinstance(whole.get(name), dict)), None)
    if nested is None:
        return whole
    said = {bool(part["tie_word_embeddings"]) for part in (whole, nested) if "tie_word_embeddings" in part} or {False}
    return nested | {"tie_word_embeddings": not has_head if len(said) == 2 else said.pop()}


def _window(config: dict[str, Any], full: dict[str, Any]) -> float:
    """Positions for which a sliding window is full attention: sequences no longer than it."""
    kinds = full.get("layer_types") or []
    used = full.get("use_sliding_window", "sliding_attention" in kinds) if "qwen" in full["model_type"] else True
    # null means no window; only a silent configuration has its family's default
    window = config["sliding_window"] if "sliding_window" in config else full.get("sliding_window")
    return window if used and window else math.inf


def _rope(full: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(found := full.get(name) or {}, dict):
            raise _refuse(f"{name} {found!r}", "an object")
        rope |= found
    check_numbers(rope, (), ("rope_theta", "factor"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", full["rope_theta"])
    if base != int(base):
        raise _refuse(f"rope_theta {base}", "a whole number (--rotary-base)")
    if rope.get("partial_rotary_factor", full.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refuse("a partial rotary embedding", "rotary embedding of the whole head")
    settings: dict[str, Any] = {"rope_base": int(base)}
    if kind in ("default", "mrope"):  # mrope: the three axes of a text position are equal, which is plain RoPE
        return settings
    factor = rope.get("factor", 1.0)
    if kind == "linear" and factor == int(factor):
        return settings | {"rope_interpolation": int(factor)}
    if kind == "llama3" and all(rope.get(name, value) == value for name, value in _LLAMA3.items()):
        return settings | {"rope_llama3_factor": float(factor)}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    raise _refuse(f"rope scaling {scaling}", f"default, linear by a whole factor, or llama3 with {_LLAMA3}")


def _refuse(given: str, allowed: str, change: str = "the model") -> Exception:
    return refuse(_CONFIG, given=given, allowed=allowed, change=change)
