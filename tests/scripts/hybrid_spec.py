"""A hybrid stack of attention and MLP layers that needs no Transformer Engine: ``--spec tests.scripts.hybrid_spec
local_hybrid_stack_spec``. State-space layers need kernels for a GPU."""

from __future__ import annotations

import inspect

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
except ImportError:  # core 0.17
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules
try:
    from megatron.core.ssm.mlp_layer import MLPLayer
except ImportError:
    MLPLayer = TransformerLayer

_options = {"normalization": "RMSNorm"}
_known = inspect.signature(get_gpt_layer_local_spec).parameters
_layer = get_gpt_layer_local_spec(**{name: value for name, value in _options.items() if name in _known}).submodules

local_hybrid_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=_layer.input_layernorm,
                self_attention=_layer.self_attention,
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=_layer.pre_mlp_layernorm, mlp=_layer.mlp, mlp_bda=get_bias_dropout_add
            ),
        ),
    ),
)
