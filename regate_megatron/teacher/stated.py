"""What a checkpoint says of the language model in it: by its own file, by Megatron's arguments, or by Bridge's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regate_megatron.errors import refuse
from regate_megatron.teacher.values import NEUTRAL

OWN_FILE = "language_model.json"  # beside the weights in what save_language_model writes
_BRIDGE_FILE = "run_config.yaml"  # Megatron-Bridge's, in the folder of an iteration
SETTINGS_FILES = (OWN_FILE, _BRIDGE_FILE)
CERTAIN = "huggingface_model_type"  # said by conversions, which say what the model is and not what a script was given

# What examples/multimodal sets on the language model's config by --language-model-type, over its arguments.
_SET_BY_MULTIMODAL = {"activation_func", "add_bias_linear", "add_qkv_bias", "ffn_hidden_size", "gated_linear_unit"}
_SET_BY_MULTIMODAL |= {"hidden_size", "kv_channels", "layernorm_epsilon", "layernorm_zero_centered_gamma"}
_SET_BY_MULTIMODAL |= {"mamba_head_dim", "mamba_num_heads", "mamba_state_dim", "normalization", "num_attention_heads"}
_SET_BY_MULTIMODAL |= {"num_layers", "num_query_groups", "qk_layernorm"}


def stated_settings(path: Path, saved: Any) -> dict[str, Any] | None:
    """What the checkpoint at ``path`` says of its language model, by the names of Megatron's config; None: nothing.

    Args:
        path: the folder of the iteration.
        saved: Megatron's arguments in it, None where there are none.
    """
    own = path / OWN_FILE
    if own.is_file():
        try:
            return dict(json.loads(own.read_text()))
        except (OSError, ValueError, TypeError) as error:
            form = {"allowed": "a complete checkpoint", "change": "to one saved or copied in full"}
            raise refuse("checkpoint", given=f"{own}, unreadable ({type(error).__name__})", **form) from error
    if saved is not None:
        return _of_arguments(saved)
    try:
        return _model_of_bridge((path / _BRIDGE_FILE).read_text())
    except Exception:  # absent, or of a kind that only Bridge can read: it says nothing
        return None


def _of_arguments(saved: Any) -> dict[str, Any]:
    """Megatron's arguments by the names of its config; see ``core_transformer_config_from_args``."""
    given = dict(vars(saved))

    def says(name: str) -> bool:
        return given.get(name) is not None

    stated = {name: value for name, value in given.items() if name not in NEUTRAL}
    renamed = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon"}
    renamed |= {"apply_layernorm_1p": "layernorm_zero_centered_gamma"}
    for theirs, ours in renamed.items():
        if theirs in given:
            stated[ours] = given[theirs]
    if "swiglu" in given:
        stated["gated_linear_unit"] = bool(given["swiglu"] or given.get("quick_geglu"))
        kinds = {"swiglu": "silu", "squared_relu": "squared_relu", "quick_geglu": "quick_gelu"}
        stated["activation_func"] = next((kind for name, kind in kinds.items() if given.get(name)), "gelu")
    if not given.get("group_query_attention", True):
        stated["num_query_groups"] = given.get("num_attention_heads")
    if says("position_embedding_type") or given.get("use_rotary_position_embeddings"):
        is_rotary = given.get("use_rotary_position_embeddings")
        stated["position_embedding_type"] = "rope" if is_rotary else given["position_embedding_type"]
    if given.get("hybrid_layer_pattern") is not None:  # says both
        stated["is_hybrid_model"] = True
        stated.pop("experimental_attention_variant", None)
    if says("language_model_type"):
        stated = {name: value for name, value in stated.items() if name not in _SET_BY_MULTIMODAL}
    return stated


def _model_of_bridge(text: str) -> dict[str, Any]:
    """The model in Megatron-Bridge's own file, which names functions and classes by their paths."""
    import yaml

    model = yaml.safe_load(text)["model"]
    stated = {name: _named(value) for name, value in model.items() if not name.startswith("_")}
    names = {"rope_scaling": "use_rope_scaling", "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor"}
    stated |= {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    stated = {name: one for name, one in stated.items() if name not in NEUTRAL or name == "position_embedding_type"}
    return stated | {CERTAIN: "Megatron-Bridge"}


def _named(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return str(value["_target_"]).rsplit(".", 1)[-1]
    return value
