"""The families of mcore-bridge: folders with their own configuration keys, in sizes that a CPU can do, and pictures.

Every picture is given as ms-swift's template of the family gives it. Vocabulary, placeholders and positions are the
tests' own; models read ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Glm4vConfig, Glm4vMoeConfig, InternVLConfig, Qwen2VLConfig

from tests.frameworks import tiny_hf

_IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5}
_TEXT = tiny_hf.TEXT | {"vocab_size": 256}
_VISION = {"depth": 2, "num_heads": 4, "patch_size": tiny_hf.PATCH}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GRID, TILE = (1, 4, 6), 56


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes), **more}


def _saved(kind: type, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Callable[[Path], None]:
    return lambda folder: kind(text_config={**_TEXT, **text}, vision_config=vision, **more).save_pretrained(folder)


def _qwen(family: str) -> Callable[[Path], None]:
    return lambda folder: tiny_hf.write(folder, family)


def _internvl(language_model: str, **text: Any) -> Callable[[Path], None]:
    # As published: rows longer than the model was made for get other frequencies.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    vision |= {"image_size": [TILE, TILE], "patch_size": [14, 14]}
    text = {"model_type": language_model, "rope_parameters": rope, **text}
    return _saved(InternVLConfig, text, vision, image_token_id=3, image_seq_length=4)


def _glm(kind: type, **text: Any) -> Callable[[Path], None]:
    vision = {**_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "image_size": 112}
    rope = _sections(2, 1, 1, partial_rotary_factor=0.5)
    return _saved(kind, {"hidden_size": 64, "rope_parameters": rope, **text}, vision, **_IDS)


def _with_grid(generator: torch.Generator) -> dict[str, torch.Tensor]:
    patches = torch.randn(24, 3 * 2 * tiny_hf.PATCH**2, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([GRID])}


def _two_tiles(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, TILE, TILE, generator=generator)}


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        write: writes the folder.
        picture: what a row with a picture brings.
        visual: positions that it has in the row.
        token: the name of the placeholder's id in the configuration.
        has_axes: whether positions have three axes (mRoPE).
        has_experts: whether layers have experts.
        trains_alike: whether it trains in TP2 as on one rank; False: it does not without ReGATE either.
    """

    write: Callable[[Path], None]
    picture: Callable[[torch.Generator], dict[str, torch.Tensor]] = _with_grid
    visual: int = 6
    token: str = "image_token_id"
    has_axes: bool = True
    has_experts: bool = False
    trains_alike: bool = True


_TILES = {"picture": _two_tiles, "visual": 8, "has_axes": False}
FAMILIES = {
    "qwen25": Family(_qwen("qwen2_5_vl")),
    "qwen3": Family(_qwen("qwen3_vl"), trains_alike=False),
    "qwen2": Family(
        _saved(
            Qwen2VLConfig,
            {"rope_parameters": _sections(1, 1, 2)},
            {**_VISION, "embed_dim": 32, "hidden_size": 32},
            **_IDS,
        )
    ),
    "internvl": Family(_internvl("qwen2"), **_TILES),
    "internvl_qwen3": Family(_internvl("qwen3", head_dim=8), **_TILES),
    "glm4v": Family(_glm(Glm4vConfig)),
    "glm4v_moe": Family(
        _glm(Glm4vMoeConfig, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, **_EXPERTS),
        has_experts=True,
        trains_alike=False,
    ),
}
# Rows are longer than its configuration says: the frequencies of its RoPE would depend on their length.
TOO_LONG = Family(_internvl("qwen2", max_position_embeddings=16), **_TILES)
