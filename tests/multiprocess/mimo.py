"""A MimoModel as the LLaVA example of MIMO is built, and batches as its task encoder makes them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.partition import utils as partition
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from regate_megatron.cpu.emulation.attention import partitioned_indices

TOKEN = 60  # stands for a position of a picture

# Transformer Engine's function that cuts packed rows over context ranks, as the emulation has it.
partition.tex = SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
partition._HAVE_TEX, partition.is_te_min_version = True, lambda *_: True


def mimo_model(config, vision, projection, layers, *, side, patch, vocabulary, length, packs) -> MimoModel:
    """A tower of CLIP's, its projection, and a language model."""
    language = {"vocab_size": vocabulary, "max_sequence_length": length}
    tower = {"transformer_config": vision, "transformer_layer_spec": get_vit_layer_with_local_spec()}
    tower |= {"patch_dim": patch, "img_h": side, "img_w": side, "add_class_token": False, "class_token_len": 0}
    project = {"config": projection, "submodules": layers, "projector_type": "mlp", "input_size": vision.hidden_size}
    pictures = {
        "encoders": {"clip_encoder": ModuleSpec(module=CLIPViTModel, params=tower)},
        "input_projections": [ModuleSpec(module=MultimodalProjector, params=project)],
    }
    language |= {"transformer_layer_spec": get_gpt_decoder_block_spec(config, use_transformer_engine=False)}
    language |= {"position_embedding_type": "rope", "scatter_embedding_sequence_parallel": False, "config": config}
    return MimoModel(
        MimoModelConfig(
            language_model_spec=ModuleSpec(module=GPTModel, params=language),
            modality_submodules_spec={"images": ModuleSpec(module=VisionModalitySubmodules, submodules=pictures)},
            special_token_ids={"images": TOKEN},
            kv_format="thd" if packs else "sbhd",
        )
    )


def put_pictures(batch: dict, image: torch.Tensor, place: int, patch: int) -> None:
    """Write a picture into every row of a batch for MIMO, and what its encoder is called with beside it."""
    tokens, visual = batch["tokens"], (image.shape[-1] // patch) ** 2
    tokens[tokens >= TOKEN] = 1
    tokens[:, place : place + visual] = TOKEN
    batch["labels"] = torch.cat([tokens[:, 1:], batch["labels"][:, -1:]], dim=1)
    batch["loss_mask"][:, max(0, place - 1) : place + visual] = 0
    batch["modality_inputs"] = {"images": {"clip_encoder": {"x": image}}}


def end_to_end(batch: dict) -> None:
    """Lay rows end to end, a sample each, as MIMO's task encoder packs."""
    rows, length = batch["tokens"].shape
    for name in ("tokens", "labels", "loss_mask"):
        batch[name] = batch[name].reshape(1, -1)
    batch["position_ids"] = torch.arange(rows * length)[None]
    starts, most = torch.arange(rows + 1, dtype=torch.int32) * length, torch.tensor(length, dtype=torch.int32)
    ends = {f"cu_seqlens_{one}": starts for one in ("q", "kv", "q_padded", "kv_padded")}
    batch["packing_kwargs"] = ends | {"max_seqlen_q": most, "max_seqlen_kv": most}
