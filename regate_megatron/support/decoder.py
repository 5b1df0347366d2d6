"""Rules about the decoder: its class, layers, positions and experts."""

from __future__ import annotations

from typing import Any

from regate_megatron.config import flag
from regate_megatron.support.setting import Rule, Setting, field, first_field

# Layers of a HybridModel whose tokens meet in softmax attention over the whole sequence, or not at all.
_EXACT_LAYERS = "*+-E"
_OTHER_LAYERS = {"M": "Mamba", "G": "gated delta net", "D": "sparse attention"}


def _model_class(setting: Setting) -> Any:
    names = [type(chunk).__name__ for chunk in setting.chunks]
    return None if all(_is_known(chunk) for chunk in setting.chunks) else ", ".join(names)


def _is_known(chunk: Any) -> bool:
    from megatron.core.models.gpt import GPTModel

    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:  # before 0.18
        return isinstance(chunk, GPTModel)
    return isinstance(chunk, (GPTModel, HybridModel))


def _inexact_layers(setting: Setting) -> Any:
    kinds = sorted(set((setting.pattern or "").split("/")[0]) - set(_EXACT_LAYERS + "|"))
    return ", ".join(_OTHER_LAYERS.get(kind, kind) for kind in kinds) or None


def _layers_of_first_chunk(setting: Setting) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    stages = setting.model.pipeline_model_parallel_size
    if pattern := setting.pattern:
        segments = pattern.split("/")[0].split("|")  # stages parted by "|"; what follows "/" predicts ahead
        if len(segments) > 1:
            return len(segments[0])
        return setting.model.num_layers_in_first_pipeline_stage or setting.model.num_layers // stages
    if stages == 1 and not setting.model.virtual_pipeline_model_parallel_size:
        return setting.model.num_layers
    vp_stage = 0 if setting.model.virtual_pipeline_model_parallel_size else None
    return get_num_layers_to_build(setting.model, vp_stage, 0)


def _too_many_dense_layers(setting: Setting) -> Any:
    dense, layers = setting.config.dense_layers, setting.model.num_layers
    first = _layers_of_first_chunk(setting)
    if dense >= layers:
        return f"{dense} with {layers} decoder layers"
    return f"{dense} with {first} layers in the first pipeline chunk" if dense > first else None


def _dense_last_layers(setting: Setting) -> Any:
    last, stages = setting.config.dense_last_layers, setting.model.pipeline_model_parallel_size
    if last and stages > 1:
        return f"{last} with {stages} pipeline stages"
    first, layers = setting.config.dense_layers, setting.model.num_layers
    if last and layers and first + last >= layers:  # flags with a layer pattern have no number of layers
        return f"{last} with {flag('dense_layers')} {first} of {layers} decoder layers"
    return None


def _routing(setting: Setting) -> Any:
    kinds = setting.model.moe_router_load_balancing_type
    kinds = kinds if isinstance(kinds, list) else [kinds]
    wrong = [kind for kind in kinds if kind in ("sinkhorn", "quantile_balancing")]
    return ", ".join(wrong) or first_field("moe_router_force_load_balancing", "moe_enable_routing_replay")(setting)


def _dispatcher(setting: Setting) -> Any:
    if setting.model.num_moe_experts and setting.model.moe_token_dispatcher_type == "flex":
        return "moe_token_dispatcher_type=flex"
    return first_field("moe_enable_deepep", "moe_paged_stash")(setting)


def _position_embedding(setting: Setting) -> Any:
    kind = setting.chunks[0].position_embedding_type
    if kind == "mrope" and setting.model.context_parallel_size > 1:
        return "mrope with context parallelism"
    return None if kind in ("rope", "yarn", "mrope", "learned_absolute", "none") else kind


def _fused_latent_rope(setting: Setting) -> Any:
    return "fused RoPE" if setting.model.multi_latent_attention and setting.model.apply_rope_fusion else None


def _more_than_one_token(setting: Setting) -> Any:
    depths = (setting.pattern or "").count("/")
    return field("mtp_num_layers")(setting) or (f"{depths} in the layer pattern" if depths else None)


DECODER_RULES = (
    Rule(
        "model",
        _model_class,
        "GPTModel or HybridModel, alone or in a LLaVAModel",
        "the model class",
        "other layers are not adapted",
        in_flags=False,
        ends=True,
    ),
    Rule(
        "layers of a hybrid model",
        _inexact_layers,
        "attention, multi-latent attention, MLP and expert layers",
        "the layer pattern, or train it without --regate",
        "state or convolution would skip elided tokens",
    ),
    Rule(
        flag("dense_layers"),
        _too_many_dense_layers,
        "fewer than the decoder's layers, none past the first pipeline chunk",
        "it to 1, or to a smaller number",
        "pipeline stages after the first exchange short sequences",
        in_flags=False,
    ),
    Rule(
        flag("dense_last_layers"),
        _dense_last_layers,
        "fewer than the layers after the first dense ones, without pipeline stages",
        "it to 0, or --pipeline-model-parallel-size to 1",
        "elided positions come back where the whole decoder is",
    ),
    Rule(
        "expert routing",
        _routing,
        "top-k routing, with auxiliary losses or expert bias",
        "--moe-router-load-balancing-type",
        "a token's expert would depend on elided tokens",
    ),
    Rule(
        "expert capacity",
        first_field(
            *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_expert_rank_capacity_factor"),
        ),
        "experts that drop no token",
        "the command: leave the capacity out",
        "which tokens are dropped would depend on the length",
    ),
    Rule(
        "expert dispatcher",
        _dispatcher,
        "allgather or alltoall, without fixed buffers",
        "--moe-token-dispatcher-type",
        "buffers are sized at first use",
    ),
    Rule(
        "position embedding",
        _position_embedding,
        "rope, yarn, learned_absolute or none; mrope without context parallelism",
        "--position-embedding-type",
        "relative distances would count kept tokens only",
    ),
    Rule(
        "multi-latent attention",
        _fused_latent_rope,
        "unfused RoPE",
        "the command: add --no-rope-fusion",
        "the fused kernel makes its own positions",
    ),
    Rule(
        "sliding-window attention",
        field("window_size"),
        "full causal attention",
        "the model, or train it without --regate",
        "distances would count kept tokens only",
    ),
    Rule(
        "multi-token prediction",
        _more_than_one_token,
        "no MTP layers",
        "the command: leave out --mtp-num-layers, m in a pipeline layout, / and what follows it in a pattern",
        "targets would become the next kept token",
    ),
    Rule(
        "linear or experimental attention",
        lambda s: field("experimental_attention_variant")(s) or field("linear_attention_freq")(s),
        "softmax attention in every layer",
        "the model, or train it without --regate",
        "state would skip elided tokens",
    ),
)
