"""Megatron models and batches of the GPU benchmarks.

The shapes are those of today's small decoders: RMSNorm, SwiGLU, grouped queries, tied embeddings. Three kinds of
layers: ``te`` (Transformer Engine's, with its attention), ``flash`` (Megatron's local ones with torch's own flash
kernel, for where Transformer Engine is missing) and ``local`` (Megatron's local ones with its own unfused attention).

Shapes: S positions, B rows, N heads, D per head, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.work import Work


@dataclass(frozen=True)
class Size:
    """One decoder: layers, hidden size, heads, key-value groups, width of the MLP, vocabulary."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int


# The first two have the shapes of Llama 3.2 1B and 3B.
SIZES = {
    "1B": Size(16, 2048, 32, 8, 8192, 128256),
    "3B": Size(28, 3072, 24, 8, 8192, 128256),
    "small": Size(4, 256, 8, 4, 512, 1024),
    "tiny": Size(4, 64, 4, 2, 128, 256),
}


class FlashAttention(torch.nn.Module):
    """Core attention by torch's flash kernel, causal, without mask or dropout; Megatron builds it like its own.

    On a GPU nothing but the flash kernel may run: it raises where that cannot.
    """

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.config, self.scale = config, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[S, B, N, D] and keys, values of fewer heads -> [S, B, H]."""
        query, key, value = (one.permute(1, 2, 0, 3) for one in (query, key, value))
        backends = [SDPBackend.FLASH_ATTENTION] if query.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(backends):
            context = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=key.shape[1] != query.shape[1]
            )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()


def transformer_config(size: Size, *, dtype: torch.dtype, fused: bool, **options: Any) -> TransformerConfig:
    """The decoder's config.

    Args:
        fused: Megatron's compiled activation and residual functions, as on a cluster; needs a GPU.
    """
    half = dtype == torch.bfloat16
    settings = {
        "num_layers": size.layers,
        "hidden_size": size.hidden,
        "ffn_hidden_size": size.ffn,
        "num_attention_heads": size.heads,
        "num_query_groups": size.groups,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": half,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "deallocate_pipeline_outputs": True,
    }
    return TransformerConfig(**{**settings, **options})


def layer_spec(attention: str, config: TransformerConfig) -> Any:
    """What the layers are made of."""
    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=attention == "te")
    if attention == "te":
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if attention == "flash":
        spec.submodules.self_attention.submodules.core_attention = FlashAttention
    return spec


def gpt(
    size: Size, attention: str, length: int, device: torch.device, config: TransformerConfig, **options: Any
) -> Any:
    """A GPTModel with weights of its own random initialisation, seeded."""
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1234)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(attention, config),
        vocab_size=size.vocab,
        max_sequence_length=length,
        **{"position_embedding_type": "rope", "share_embeddings_and_output_weights": True, **options},
    )
    model.model_type = ModelType.encoder_or_decoder  # as megatron.training sets it
    return model.to(device=device, dtype=config.params_dtype)


def text_batch(
    size: Size, rows: int, length: int, context_share: float, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Random tokens; the first ``context_share`` of every row has no loss, as a picture and a prompt have none."""
    token_BS = torch.randint(1, size.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    loss_mask_BS = torch.ones(rows, length)
    loss_mask_BS[:, : int(length * context_share)] = 0
    batch = {
        "tokens": token_BS[:, :-1],
        "labels": token_BS[:, 1:],
        "loss_mask": loss_mask_BS,
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    return {name: value.contiguous().to(device) for name, value in batch.items()}


def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step of a GPTModel; the mean loss over the targets in the mask."""
    batch = next(iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_func(output_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BS = batch["loss_mask"]
        loss = (output_BS.float() * mask_BS).sum() / mask_BS.sum()
        return loss, {"lm loss": loss.detach()}

    return losses, loss_func


def forward_backward(
    schedule: Any, step: Any, model: Any, batches: Sequence[dict[str, Tensor]], *, rows: int, length: int
) -> Any:
    """One training pass of a schedule over microbatches of ``rows`` rows; what the schedule returns.

    Args:
        step: as :func:`forward_step`.
        length: positions of a row inside the model.
    """
    return schedule(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=False,
    )


def layer_weights(model: Any) -> int:
    """Weights of one decoder layer's matrices."""
    layer = model.decoder.layers[-1]
    return sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)


def work_of(model: Any, rows: int) -> Work:
    """The work of a GPTModel's step."""
    config = model.config
    return Work(
        rows=rows,
        num_layers=config.num_layers,
        weights_per_layer=layer_weights(model),
        attention_width=config.kv_channels * config.num_attention_heads,
        head_weights=config.hidden_size * model.vocab_size,
    )
