"""The kinds of mcore-bridge's one multimodal class: one row per model type of their Hugging Face configuration.

All have placeholders written out in full, one per visual position. What differs is what the placeholder is, and how
pixels lie in a batch: beside grids, patches of a position one after the other (Qwen-VL, GLM-V, LLaVA-OneVision 1.5) or
row by row of the picture (Kimi); or as tiles of one size without grids (InternVL), each of which is a medium of its
own.

To add a kind: a row, and a test that runs it.

Shapes: T tiles of C colours, H rows and W columns of pixels; N visual positions of a medium, D values under each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.media import cells_of_image, some_of_each
from regate_megatron.batches.qwen_vl import QwenVLBatches
from regate_megatron.batches.refusals import on_one_context_rank, refused_model
from regate_megatron.batches.swift import SwiftBatches

_NO_TOKEN = -1


def adapter_of(model: Any, pad_token: int | None, args: Any) -> SwiftBatches:
    """The adapter of ms-swift's batches for a ``MultimodalGPTModel``.

    Raises:
        ReGateError: no row of the table; every rank has the same model, so every rank raises.
    """
    kind, text = model.config.hf_model_type, model.config.llm_model_type
    is_other = KINDS.get(kind) in (_tiles, _tiles_of_chat) and text not in ("qwen2", "qwen3")
    if kind not in KINDS or is_other:
        kind = f"{kind} over {text}" if is_other else kind
        given, allowed = f"{type(model).__name__} of {kind}", ", ".join(KINDS) + " (no other was ever run)"
        raise refused_model(given, allowed, "the model, or train it without ReGATE")
    cut = getattr(model.config, "cp_partition_mode", "zigzag")
    if cut != "zigzag":
        on_one_context_rank(
            model, f"cp_partition_mode {cut}", "or cut by zigzag, as plans are", "or the mode to zigzag"
        )
    return KINDS[kind](model.config.hf_config)


def _grids(config: Any) -> SwiftBatches:
    merge_size = config.vision_config.spatial_merge_size
    return SwiftBatches(QwenVLBatches(config.image_token_id, config.video_token_id, merge_size, takes_positions=True))


def _raster(config: Any, grids: str = "image_grid_hws") -> SwiftBatches:
    high, wide = config.vision_config.merge_kernel_size
    if high != wide:
        raise refused_model(f"merge_kernel_size {high} by {wide}", "a square", "the model, or train it without ReGATE")
    rows = QwenVLBatches(config.media_placeholder_token_id, _NO_TOKEN, high, takes_positions=True, cells=_of_raster)
    return SwiftBatches(rows, partial(_raster_grids, grids))


def _tiles_of_chat(config: Any) -> SwiftBatches:
    """InternVL's own format, which says the placeholder nowhere: the model asks the tokenizer, on its first stage."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=True)
    return _tiles(config, tokenizer.encode("<IMG_CONTEXT>", add_special_tokens=False)[0])


def _tiles(config: Any, image_token: int | None = None) -> SwiftBatches:
    patch = config.vision_config.patch_size
    side = int((patch if isinstance(patch, int) else patch[0]) / config.downsample_ratio)
    rows = QwenVLBatches(
        config.image_token_id if image_token is None else image_token,
        _NO_TOKEN,
        merge_size=1,
        takes_positions=True,
        cells=partial(_in_tile, side),
    )
    return SwiftBatches(rows, partial(_tile_grids, side))


KINDS: dict[str, Callable[[Any], SwiftBatches]] = {
    "qwen2_vl": _grids,
    "qwen2_5_vl": _grids,
    "qwen3_vl": _grids,
    "qwen3_vl_moe": _grids,
    "internvl": _tiles,
    "internvl_chat": _tiles_of_chat,
    "llavaonevision1_5": _grids,
    "glm4v": _grids,
    "glm4v_moe": _grids,
    "kimi_vl": _raster,
    "kimi_k25": partial(_raster, grids="grid_thws"),
}


def _raster_grids(name: str, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Pictures of one frame each, their patches flat.

    Raises:
        ValueError: one of several frames, which become one.
    """
    if batch.get("pixel_values") is None:
        return {}
    grid_I3 = torch.nn.functional.pad(batch[name], (3 - batch[name].shape[1], 0), value=1)
    if bool((grid_I3[:, 0] > 1).any()):
        raise ValueError(f"{name} {grid_I3.tolist()}: pictures alone, of one frame each")
    return {"pixel_values": batch["pixel_values"].flatten(1), "image_grid_thw": grid_I3}


def _of_raster(pixels: Tensor, grid_3: Tensor, merge_size: int) -> np.ndarray:
    """A few values under each position, where patches lie row by row; float [N, D]."""
    _, height, width = grid_3.tolist()
    side = merge_size
    blocks = pixels.view(height // side, side, width // side, side, -1).transpose(1, 2)
    return some_of_each(blocks.reshape(-1, side**2 * pixels.shape[1]))


def _tile_grids(side: int, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Tiles as media whose grids are squares of ``side`` pixels. The pixels stay where they are: a view."""
    if batch.get("pixel_values") is None:
        return {}
    tile_TCHW = batch["pixel_values"]
    height, width = (pixels // side for pixels in tile_TCHW.shape[-2:])
    grid_T3 = torch.tensor([[1, height, width]]).expand(len(tile_TCHW), -1)
    return {"pixel_values": tile_TCHW.reshape(len(tile_TCHW) * height * width, -1), "image_grid_thw": grid_T3}


def _in_tile(side: int, pixels: Tensor, grid_3: Tensor, _merge_size: int) -> np.ndarray:
    _, height, width = grid_3.tolist()
    return cells_of_image(pixels.reshape(-1, height * side, width * side), height, width)
