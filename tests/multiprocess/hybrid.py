"""A HybridModel of Megatron's local modules; its own layer specs are of Transformer Engine's."""

from __future__ import annotations

from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


def hybrid_model(config, case, first, last, vp_stage):
    """The hybrid model of a parity case, ``case["pattern"]`` its layers."""
    local = partial(get_gpt_layer_local_submodules, normalization=config.normalization)

    def attention(submodules):
        parts = {name: getattr(submodules, name) for name in ("input_layernorm", "self_attention", "self_attn_bda")}
        return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**parts))

    def mlp(module, submodules):
        parts = {name: getattr(submodules, name) for name in ("pre_mlp_layernorm", "mlp", "mlp_bda")}
        return ModuleSpec(module=module, submodules=TransformerLayerSubmodules(**parts))

    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=attention(local()),
            mla_layer=attention(local(multi_latent_attention=True, qk_layernorm=True)),
            mlp_layer=mlp(MLPLayer, local()),
            moe_layer=mlp(MoETransformerLayer, local(num_experts=config.num_moe_experts or 1)),
        ),
    )
    return HybridModel(
        config,
        stack,
        case["vocab"],
        case["length"],
        hybrid_layer_pattern=case["pattern"],
        pre_process=first,
        post_process=last,
        position_embedding_type=case.get("positions", "rope"),
        share_embeddings_and_output_weights=case.get("tied", False),
        vp_stage=vp_stage,
    )
