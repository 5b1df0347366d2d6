"""mcore-bridge under the emulation, and its models from a tiny Hugging Face folder.

It names classes of Transformer Engine when it is imported, and builds every layer of them: empty classes stand in their
place, and layers and norms are Megatron's own. Adapters of such layers it has for Ascend's processors: that is the way
they are made here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regate_megatron.teacher.weights import local_name
from tests.frameworks import bridge_on_cpu


def install() -> None:
    """Put Megatron on the CPU and let mcore-bridge be imported, for the rest of this process."""
    bridge_on_cpu.install()
    import megatron.core.extensions.transformer_engine as extensions

    empty = ("TEFusedMLP", "TEGroupedLinear", "TELayerNormColumnParallelLinear", "TELinear")
    for name in (*empty, "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        if not isinstance(getattr(extensions, name, None), type):
            setattr(extensions, name, type(name, (torch.nn.Module,), {}))
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    extensions.TEColumnParallelLinear, extensions.TERowParallelLinear = ColumnParallelLinear, RowParallelLinear
    from mcore_bridge import GPTBridge
    from mcore_bridge.model import register
    from mcore_bridge.tuners import lora, patcher
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = register.get_gpt_decoder_block_spec

    def local_layers(config: Any, **options: Any) -> Any:
        block = original(config, **options | {"use_transformer_engine": False})
        if config.multi_latent_attention and config.q_lora_rank is None:  # nothing that it would be the norm of
            for layer in block.layer_specs:
                layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
        return block

    register.get_gpt_decoder_block_spec = local_layers
    QKNormConfigResolver._mla_fused_linear_or_default = lambda *_: _after_norm(ColumnParallelLinear, WrappedTorchNorm)
    from mcore_bridge.model.gpts import glm4

    glm4.TENorm = WrappedTorchNorm
    lora._build_local_te_linear = _Replicated
    lora.is_torch_npu_available = patcher.is_torch_npu_available = lambda: True
    move = GPTBridge._set_state_dict

    def with_norms_apart(self: Any, module: Any, key: str, *rest: Any, **options: Any) -> Any:
        return move(self, module, local_name(f".{key}")[1:], *rest, **options)

    GPTBridge._set_state_dict = with_norms_apart


def _after_norm(linear: type, norm: type) -> type:
    """A linear layer with a norm before it, which Transformer Engine has as one: of queries without a latent."""

    class AfterNorm(linear):
        def __init__(self, num_in: int, *given: Any, config: Any, **options: Any) -> None:
            super().__init__(num_in, *given, config=config, **options)
            self.norm = norm(config, num_in)

        def forward(self, hidden_LBH: torch.Tensor, *given: Any, **options: Any) -> Any:
            return super().forward(self.norm(hidden_LBH), *given, **options)

    return AfterNorm


class _Replicated(torch.nn.Linear):
    """A linear layer that all tensor ranks have whole, in checkpoints as well; one of an expert is its rank's alone."""

    def __init__(self, num_in: int, num_out: int, bias: bool, *, config: Any, is_expert: bool, **_: Any) -> None:
        super().__init__(num_in, num_out, bias)
        for parameter in self.parameters():
            parameter.allreduce = not (is_expert and config.expert_model_parallel_size > 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


def model(folder: Path, **settings: Any) -> list[Any]:
    """The chunks of the model in a Hugging Face folder, random weights."""
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig

    plain = {"use_cpu_initialization": True, "perform_initialization": True, "params_dtype": torch.float32}
    plain |= {f"{kernel}_fusion": False for kernel in ("gradient_accumulation", "masked_softmax", "bias_dropout")}
    plain |= {"bias_activation_fusion": False, "apply_rope_fusion": False, "persist_layer_norm": False}
    plain |= {"moe_grouped_gemm": False, "attention_softmax_in_fp32": True, "overlap_p2p_comm": False}
    stated = hf_to_mcore_config(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    return get_mcore_model(ModelConfig(**stated | plain | settings))
