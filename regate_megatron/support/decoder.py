"""Rules about the decoder: its class, layers, positions and experts."""

from __future__ import annotations

import inspect
from typing import Any

from regate_megatron.compat import adapters_of, is_one_of, qualified_name
from regate_megatron.config import flag
from regate_megatron.support.setting import Fields, Found, Rule, Setting

LANGUAGE_MODELS = (
    "megatron.core.models.gpt.gpt_model.GPTModel",
    "megatron.core.models.hybrid.hybrid_model.HybridModel",
    "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_model.Qwen3VLGPTModel",
    "mcore_bridge.model.gpt_model.GPTModel",
)
HYBRID_STACK = "megatron.core.models.hybrid.hybrid_block.HybridStack"
_BLOCKS = (
    "megatron.core.transformer.transformer_block.TransformerBlock",
    HYBRID_STACK,
    "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.transformer_block.Qwen3VLTransformerBlock",
    "mcore_bridge.model.modules.transformer_block.TransformerBlock",
    "mcore_bridge.model.mm_gpts.qwen3_vl.Qwen3VLTransformerBlock",
)
_ATTENTIONS = (
    "megatron.core.transformer.attention.SelfAttention",
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention",
    "megatron.core.transformer.multi_latent_attention.FusedMLASelfAttention",
    "megatron.core.transformer.identity_op.IdentityOp",
    "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.attention.Qwen3VLSelfAttention",
    "mcore_bridge.model.gpts.glm4.Glm4SelfAttention",
    "mcore_bridge.model.modules.multi_latent_attention.MLASelfAttention",
)
_SCALED_BY_PLACE = "megatron.bridge.models.ministral3.ministral3_provider.MinistralTEDotProductAttention"
_CORE_ATTENTIONS = (
    "megatron.core.transformer.dot_product_attention.DotProductAttention",
    "megatron.core.extensions.transformer_engine.TEDotProductAttention",
    _SCALED_BY_PLACE,
)
_LAYERS = (
    "megatron.core.transformer.transformer_layer.TransformerLayer",
    "megatron.core.transformer.transformer_layer.MoETransformerLayer",
    "mcore_bridge.model.modules.transformer_layer.TransformerLayer",
)
# Layers of a HybridModel whose tokens meet in softmax attention over the whole sequence, or not at all.
_EXACT_LAYERS = "*+-E"
_OTHER_LAYERS = {"M": "Mamba", "G": "gated delta net", "D": "sparse attention"}
_WINDOW = Fields("window_size", harmless=(None, False, 0, (-1, -1), (-1, 0)))
_MTP = Fields("mtp_num_layers")
_OTHER_ATTENTION = Fields("experimental_attention_variant", "linear_attention_freq")


def _model_class(setting: Setting) -> Any:
    others = [type(chunk).__name__ for chunk in setting.chunks if not is_one_of(chunk, LANGUAGE_MODELS)]
    blocks = [chunk.decoder for chunk in setting.chunks if getattr(chunk, "decoder", None) is not None]
    others += [f"{type(block).__name__} as decoder" for block in blocks if not is_one_of(block, _BLOCKS)]
    layers = [layer for block in blocks if not is_one_of(block, (HYBRID_STACK,)) for layer in block.layers]
    others += [f"{type(layer).__name__} as layer" for layer in layers if not is_one_of(layer, _LAYERS)]
    return ", ".join(dict.fromkeys(others)) or None


def _pattern_flag(setting: Setting) -> str:
    old = setting.megatron_flag("hybrid_override_pattern") and not setting.megatron_flag("hybrid_layer_pattern")
    return f"the layer pattern ({'--hybrid-override-pattern' if old else '--hybrid-layer-pattern'})"


def _inexact_layers(setting: Setting) -> Any:
    kinds = sorted(set((setting.pattern or "").split("/")[0]) - set(_EXACT_LAYERS + "|"))
    given = ", ".join(_OTHER_LAYERS.get(kind, kind) for kind in kinds)
    return Found(given, f"{_pattern_flag(setting)}, or train it without --regate") if given else None


def _layers_of_first_chunk(setting: Setting) -> int:
    """Decoder layers before the first pipeline exchange: the same number on every rank, whichever stage it is."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    stages = setting.model.pipeline_model_parallel_size
    if pattern := setting.pattern:
        segments = pattern.split("/")[0].split("|")  # stages parted by "|"; what follows "/" predicts ahead
        if len(segments) > 1:
            return len(segments[0])
        return setting.model.num_layers_in_first_pipeline_stage or setting.model.num_layers // stages
    if layout := getattr(setting.model, "pipeline_model_parallel_layout", None):
        return layout.layout[0][0].count(LayerType.decoder)  # Megatron's own count is that of the asking rank
    if stages == 1 and not setting.model.virtual_pipeline_model_parallel_size:
        return setting.model.num_layers
    vp_stage = 0 if setting.model.virtual_pipeline_model_parallel_size else None
    return get_num_layers_to_build(setting.model, vp_stage, 0)


def _too_many_dense_layers(setting: Setting) -> Any:
    dense, layers = setting.config.dense_layers, setting.model.num_layers
    first = _layers_of_first_chunk(setting)
    if dense < layers and dense <= first:
        return None
    most = min(first, layers - 1)
    change = f"it to {most}" + (", or to a smaller number" if most > 1 else "")
    if dense >= layers:
        return Found(f"{dense} with {layers} decoder layers", change)
    is_layout = getattr(setting.model, "pipeline_model_parallel_layout", None) is not None
    how = "another --pipeline-model-parallel-layout" if is_layout else "more layers for the first stage"
    return Found(f"{dense} with {first} layers in the first pipeline chunk", f"{change}, or take {how}")


def _dense_last_layers(setting: Setting) -> Any:
    last, stages = setting.config.dense_last_layers, setting.model.pipeline_model_parallel_size
    if last and stages > 1:
        return Found(f"{last} with {stages} pipeline stages", "it to 0, or --pipeline-model-parallel-size to 1")
    first, layers = setting.config.dense_layers, setting.model.num_layers
    if last and layers and first + last >= layers:  # flags with a layer pattern have no number of layers
        given = f"{last} with {flag('dense_layers')} {first} of {layers} decoder layers"
        return Found(given, f"it to {max(0, layers - first - 1)}, or {flag('dense_layers')} to a smaller number")
    return None


def _routing(setting: Setting) -> Any:
    kinds = setting.model.moe_router_load_balancing_type
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if wrong := [kind for kind in kinds if kind in ("sinkhorn", "quantile_balancing")]:
        return Found(", ".join(wrong), "--moe-router-load-balancing-type to aux_loss, or leave it out")
    return _FORCED_ROUTING(setting)


_FORCED_ROUTING = Fields("moe_router_force_load_balancing", "moe_enable_routing_replay")


def _dispatcher(setting: Setting) -> Any:
    kind = setting.model.moe_token_dispatcher_type
    if setting.model.num_moe_experts and kind == "flex":
        backend = getattr(setting.model, "moe_flex_dispatcher_backend", None) or "deepep"
        if backend not in ("deepep", "hybridep"):
            given = f"moe_token_dispatcher_type=flex with {backend}"
            return Found(given, "--moe-flex-dispatcher-backend to deepep, or --moe-token-dispatcher-type to alltoall")
    elif setting.model.num_moe_experts and kind not in ("allgather", "alltoall"):
        return Found(f"moe_token_dispatcher_type={kind}", "--moe-token-dispatcher-type to alltoall")
    return _FIXED_BUFFERS(setting)


_FIXED_BUFFERS = Fields("moe_paged_stash")


def _position_embedding(setting: Setting) -> Any:
    for kind in dict.fromkeys(chunk.position_embedding_type for chunk in setting.chunks):
        if kind not in ("rope", "yarn", "mrope", "learned_absolute", "none"):
            return kind
    return None


def _fused_latent_rope(setting: Setting) -> Any:
    return "fused RoPE" if setting.model.multi_latent_attention and setting.model.apply_rope_fusion else None


def _window(setting: Setting) -> Any:
    """In a config, or given to an attention kernel past every config."""
    if found := _WINDOW(setting):
        return found
    for place, module in setting.modules():
        window = getattr(module, "window_size", None)
        if isinstance(window, tuple) and window[0] >= 0:
            change = "window_size of that module, or train it without --regate"
            return Found(f"window_size={window} in {place}", change)
    return None


def _more_than_one_token(setting: Setting) -> Any:
    if depths := (setting.pattern or "").count("/"):
        return Found(f"{depths} in the layer pattern", f"{_pattern_flag(setting)}: end it before the /")
    found = _MTP(setting)
    beside = found and _beside_more_than_one_token(setting)
    if not beside:
        return None
    layout = getattr(setting.model, "pipeline_model_parallel_layout", None)
    parts = str(layout or "").replace("embedding", "")  # the only other word with an m in it
    also = ", and the m of --pipeline-model-parallel-layout" if "m" in parts else ""
    return Found(f"{found.given} {beside}", (found.change or "") + also)


def _beside_more_than_one_token(setting: Setting) -> str | None:
    """What :mod:`regate_megatron.decoder.ahead` is not exact with, or was not tried with."""
    if setting.pattern:
        return "in a HybridModel"
    models = [chunk for chunk in setting.chunks if hasattr(chunk, "named_modules")]
    others = [qualified_name(type(chunk)) for chunk in models if not is_one_of(chunk, LANGUAGE_MODELS[:1])]
    if setting.is_multimodal or others:
        return f"in {', '.join(dict.fromkeys(others)) or 'a multimodal model'}"
    if setting.model.context_parallel_size > 1:
        return "with context parallelism"
    if any(adapters_of(chunk) for chunk in models):
        return "with adapters"
    if getattr(setting.model, "mtp_hsm", False):
        return "with mtp_hsm"
    if setting.model.num_moe_experts and not _tells_padding_ahead():
        return "with experts in Megatron-Core 0.17"
    layout = getattr(setting.model, "pipeline_model_parallel_layout", None)
    if hasattr(layout, "layout") and not any(kind.name == "mtp" for kind in layout.layout[-1][-1]):
        return "on a stage of their own"
    return None


def _tells_padding_ahead() -> bool:
    """Whether experts of MTP layers can be told which slots are fill."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

    return "padding_mask" in inspect.signature(MultiTokenPredictionBlock.forward).parameters


def _other_attention(setting: Setting) -> Any:
    """By config, or by a layer spec of one's own that puts another module where attention is."""
    if found := _OTHER_ATTENTION(setting):
        return found
    known = {"self_attention": _ATTENTIONS, "core_attention": _CORE_ATTENTIONS}
    for place, module in setting.modules():
        classes = known.get(place.rpartition(".")[2])
        if classes and not is_one_of(module, classes):
            return Found(f"{type(module).__name__} in {place}", "the layer spec (--spec), or train it without --regate")
        if is_one_of(module, (_SCALED_BY_PLACE,)) and (found := _scaled_by_place(setting)):
            return Found(f"queries scaled by their place, {found.given} ({place})", found.change)
    return None


def _scaled_by_place(setting: Setting) -> Found | None:
    """What keeps :mod:`regate_megatron.decoder.query_scale` from being exact."""
    if setting.model.context_parallel_size > 1:
        change = "--context-parallel-size to 1 (context_parallel_size of the model's config)"
        return Found("with context parallelism, whose ranks each count from 0", change)
    kinds = {chunk.position_embedding_type for chunk in setting.chunks} - {"rope", "yarn"}
    if kinds or setting.model.multi_latent_attention:
        return Found("without the rotary table of rope or yarn", "--position-embedding-type to rope or yarn")
    if getattr(setting.model, "fused_single_qkv_rope", False):
        change = "fused_single_qkv_rope of the model's config to False"
        return Found("with fused_single_qkv_rope, where queries come with keys and values in one", change)
    return None


DECODER_RULES = (
    Rule(
        "model",
        _model_class,
        "GPTModel or HybridModel, alone or in a model of a known family",
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
        "it to a smaller number, or take more layers for the first stage",
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
        "--moe-router-load-balancing-type, or leave the flag out",
        "a token's expert would depend on elided tokens",
    ),
    Rule(
        "expert capacity",
        Fields("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_expert_rank_capacity_factor"),
        "experts that drop no token",
        "the command: leave the flag of the capacity out",
        "which tokens are dropped would depend on the length",
    ),
    Rule(
        "expert dispatcher",
        _dispatcher,
        "allgather, alltoall, or flex with DeepEP or HybridEP (not tried without a GPU); without fixed buffers",
        "--moe-token-dispatcher-type to alltoall, or leave the flag out",
        "other buffers are sized at first use",
    ),
    Rule(
        "position embedding",
        _position_embedding,
        "rope, yarn, mrope, learned_absolute or none",
        "--position-embedding-type",
        "relative distances would count kept tokens only",
    ),
    Rule(
        "multi-latent attention",
        _fused_latent_rope,
        "unfused RoPE",
        "the command: add --no-rope-fusion (apply_rope_fusion)",
        "the fused kernel makes its own positions",
    ),
    Rule(
        "sliding-window attention",
        _window,
        "full causal attention",
        "the command: leave --window-size out, or train the model without --regate",
        "distances would count kept tokens only",
    ),
    Rule(
        "multi-token prediction",
        _more_than_one_token,
        "MTP layers of a GPTModel by itself, on the stage of its loss, without context parallelism and adapters",
        "the command: leave out --mtp-num-layers, m in a pipeline layout, / and what follows it in a pattern",
        "each context rank weighs their losses by its own tokens; other models were not tried",
    ),
    Rule(
        "linear or experimental attention",
        _other_attention,
        "softmax attention in every layer",
        "the model, or train it without --regate",
        "state would skip elided tokens",
    ),
)
