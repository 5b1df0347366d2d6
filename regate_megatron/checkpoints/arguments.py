"""Megatron's arguments <-> :class:`Architecture`: what is stored in a checkpoint, and the flags that match a model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from regate_megatron.checkpoints.families import FAMILIES, LLAMA, QWEN2, QWEN3, Architecture, Family, allowed_families
from regate_megatron.errors import refuse
from regate_megatron.method.budget import align_up

DEFAULT_DIVISOR = 128  # Megatron's own default of --make-vocab-size-divisible-by


def padded_vocabulary(num_rows: int, divisor: int, tensor_size: int) -> int:
    """Rows of Megatron's word embedding: a multiple of ``divisor * tensor_size``, as Megatron pads."""
    return align_up(num_rows, divisor * tensor_size)


def divisor_for(num_tokens: int, padded: int, tensor_size: int, wanted: int) -> int:
    """What ``--make-vocab-size-divisible-by`` must be, so that Megatron pads ``num_tokens`` to ``padded`` rows.

    Some models' embeddings have more rows than their tokenizer has tokens; Megatron starts from the tokenizer. Returns
    ``wanted`` where that is right or nothing is.
    """
    if align_up(num_tokens, wanted * tensor_size) == padded:
        return wanted
    per_rank = padded // tensor_size
    fitting = (divisor for divisor in range(1, per_rank + 1) if per_rank % divisor == 0)
    return next((d for d in fitting if align_up(num_tokens, d * tensor_size) == padded), wanted)


def to_arguments(architecture: Architecture, *, padded_vocab: int, divisor: int, tensor_size: int) -> Namespace:
    """The arguments to store: those by which Megatron, and this package, recognise and rebuild the model."""
    a = architecture
    return Namespace(
        **_model_arguments(a),
        padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=divisor,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=1,
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_interleaved=False,
        squared_relu=False,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        vocab_size=a.vocab_size,
        seq_length=a.max_positions,
        num_experts=None,
        no_save_optim=True,
        no_save_rng=True,
        ckpt_format="torch_dist",
        huggingface_model_type=a.family.name,
    )


def _model_arguments(a: Architecture) -> dict[str, Any]:
    """What both the stored arguments and the flags say, by the names of Megatron's arguments."""
    values: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_heads,
        "group_query_attention": True,
        "num_query_groups": a.num_groups,
        "kv_channels": a.head_dim,
        "max_position_embeddings": a.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": a.rope_base,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": a.family.qkv_bias,
        "qk_layernorm": a.family.qk_norm,
        "untie_embeddings_and_output_weights": not a.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_rope_scaling": a.rope_llama3_factor is not None,
    }
    if a.rope_llama3_factor is not None:
        values["rope_scaling_factor"] = a.rope_llama3_factor
    if a.rope_interpolation is not None:
        values["rotary_seq_len_interpolation_factor"] = a.rope_interpolation
    return values


_OTHER_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}


def model_flags(architecture: Architecture, divisor: int) -> list[str]:
    """Megatron-LM's flags for this model, a word each, to be pasted into a command."""
    words: list[str] = []
    for name, value in (_model_arguments(architecture) | {"make_vocab_size_divisible_by": divisor}).items():
        flag = _OTHER_FLAGS.get(name, "--" + name.replace("_", "-"))
        if name == "add_bias_linear":
            words.append("--disable-bias-linear")
        elif isinstance(value, bool):
            words += [flag] if value else []
        else:
            words += [flag, str(value)]
    return words


def from_arguments(saved: Any, family: str | None = None, what: str = "--family") -> Architecture:
    """The model that stored arguments describe.

    Args:
        saved: the namespace of a checkpoint.
        family: the family to name; None: the one stored by the conversion, else the plainest with the same switches.
        what: the option that named the family.

    Raises:
        ReGateError: arguments are missing, or the model is in none of the families, or not in ``family``.
    """
    if getattr(saved, "num_layers", None) is None or getattr(saved, "padded_vocab_size", None) is None:
        raise _refuse("a checkpoint without Megatron's model arguments", "the command: add --like HF_DIR")
    expected = {
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "num_experts": None,
        "multi_latent_attention": False,
        "window_size": None,
        "apply_layernorm_1p": False,
    }
    for name, value in expected.items():
        if (found := getattr(saved, name, value)) != value and not (not found and not value):
            raise _refuse(f"a model trained with {name} {found}")
    grouped = getattr(saved, "group_query_attention", False)
    rope_scaled = getattr(saved, "use_rope_scaling", False)
    heads = saved.num_attention_heads
    vocab = getattr(saved, "vocab_size", None) or saved.padded_vocab_size
    return Architecture(
        family=_family(saved, family, what),
        num_layers=saved.num_layers,
        hidden_size=saved.hidden_size,
        ffn_hidden_size=saved.ffn_hidden_size,
        num_heads=heads,
        num_groups=saved.num_query_groups if grouped else heads,
        head_dim=getattr(saved, "kv_channels", None) or saved.hidden_size // heads,
        vocab_size=min(vocab, saved.padded_vocab_size),
        norm_eps=getattr(saved, "layernorm_epsilon", 1e-5),
        rope_base=int(getattr(saved, "rotary_base", 10000)),
        rope_interpolation=getattr(saved, "rotary_seq_len_interpolation_factor", None),
        rope_llama3_factor=float(getattr(saved, "rope_scaling_factor", 8.0)) if rope_scaled else None,
        max_positions=getattr(saved, "max_position_embeddings", None) or saved.seq_length,
        tied=not getattr(saved, "untie_embeddings_and_output_weights", False),
    )


def _family(saved: Any, name: str | None, what: str) -> Family:
    switches = (bool(getattr(saved, "add_qkv_bias", False)), bool(getattr(saved, "qk_layernorm", False)))
    name = name or getattr(saved, "huggingface_model_type", None)
    if name is None:
        family = next((f for f in (LLAMA, QWEN2, QWEN3) if (f.qkv_bias, f.qk_norm) == switches), None)
        if family is None:
            raise _refuse("a model with --add-qkv-bias and --qk-layernorm")
        return family
    family = FAMILIES.get(name)
    if family is None:
        raise refuse(what, given=name, allowed=allowed_families(), change="it")
    if (family.qkv_bias, family.qk_norm) != switches:
        raise refuse(
            what,
            given=f"{name} for a model with add_qkv_bias {switches[0]} and qk_layernorm {switches[1]}",
            allowed=f"add_qkv_bias {family.qkv_bias} and qk_layernorm {family.qk_norm}",
            change="it",
        )
    return family


def _refuse(given: str, change: str = "the checkpoint") -> Exception:
    return refuse("--source", given=given, allowed=f"the arguments of a dense {allowed_families()}", change=change)
