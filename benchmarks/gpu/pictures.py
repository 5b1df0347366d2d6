"""A LLaVAModel round the benchmarks' decoder, its batches, and one forward for both kinds of model.

Shapes: S text positions of which one stands for the picture, B rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import get_submodules
from torch import Tensor

from benchmarks.gpu.models import Size, layer_spec, transformer_config
from regate_megatron.cpu.emulation import megatron_core

PICTURE, PATCH = 16, 8  # pixels
VISUAL = (PICTURE // PATCH) ** 2  # positions of a picture in a merged row
PLACE = 3  # text position of the picture


def llava(size: Size, layers: str, length: int, device: torch.device, config: TransformerConfig) -> LLaVAModel:
    """A LLaVAModel: a vision tower of one layer, a projection, the decoder of ``config``."""
    if not HAVE_TE:
        megatron_core._patch_clip_norm()  # Megatron's default norm there does not take its own arguments
    model_parallel_cuda_manual_seed(1234)
    plain = {
        "num_layers": 1,
        "normalization": "LayerNorm",
        "num_query_groups": size.heads,
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "use_cpu_initialization": config.use_cpu_initialization,
    }
    vision, projection = (transformer_config(size, dtype=config.params_dtype, fused=False, **plain) for _ in range(2))
    vision.vision_model_type, projection.ffn_hidden_size = "clip", size.hidden
    tower = get_vit_layer_with_transformer_engine_spec if layers == "te" else get_vit_layer_with_local_spec
    model = LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=layer_spec(layers, config),
        language_vocab_size=size.vocab,
        language_max_sequence_length=merged_length("llava", length),
        vision_transformer_config=vision,
        vision_transformer_layer_spec=tower(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=get_submodules(layer_spec("local", config).submodules.mlp),
        language_position_embedding_type="rope",
        img_h=PICTURE,
        img_w=PICTURE,
        patch_dim=PATCH,
    )
    model.model_type = ModelType.encoder_or_decoder
    return model.to(device=device, dtype=config.params_dtype)


def add_picture(batch: dict[str, Tensor], generator: torch.Generator, dtype: torch.dtype) -> None:
    """Make a LLaVA batch of a text batch on the CPU: one random picture per row."""
    batch["tokens"] = batch["tokens"].clone()
    batch["tokens"][:, PLACE] = DEFAULT_IMAGE_TOKEN_INDEX
    batch["labels"] = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1).clamp_min(0)
    batch["loss_mask"] = batch["loss_mask"].clone()
    batch["loss_mask"][:, : PLACE + 1] = 0
    batch["image"] = torch.randn(len(batch["tokens"]), 3, PICTURE, PICTURE, generator=generator).to(dtype)


def merged_length(model: str, text: int) -> int:
    """Positions of a row inside the model."""
    return text - 1 + VISUAL if model == "llava" else text


def run_model(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per-token losses, and the loss mask that belongs to them; both [B, positions]."""
    labels, mask = batch["labels"], batch["loss_mask"]
    if "image" not in batch:
        return model(batch["tokens"], batch["position_ids"], None, labels=labels), mask
    return model(batch["image"], batch["tokens"], batch["position_ids"], None, labels, mask)
