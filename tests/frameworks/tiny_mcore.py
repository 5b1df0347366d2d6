"""The families of mcore-bridge: folders with their own configuration keys, in sizes that a CPU can do, and pictures.

Every picture is given as ms-swift's template of the family gives it. Vocabulary, placeholders and positions are the
tests' own; models read ids.

Four families bring their tower, and classes of configurations, as code in their folder on the Hugging Face hub. That
code is not ours to copy: in its place lie files of ``hub_code``, with a small tower behind the same names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Glm4vConfig, Glm4vMoeConfig, InternVLConfig, Qwen2VLConfig, Qwen3VLMoeConfig

from tests.frameworks import tiny_hf

_IDS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5}
_TEXT = tiny_hf.TEXT | {"vocab_size": 256}
_VISION = {"depth": 2, "num_heads": 4, "patch_size": tiny_hf.PATCH}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0}
_YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
_UNTIED = {"tie_word_embeddings": False}
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


def _from_hub(code: str, config: str, text_name: str, text: dict[str, Any], **more: Any) -> Callable[[Path], None]:
    """A folder with code of its own."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).with_name("hub_code") / f"{code}.py", folder)
        stated = {"auto_map": {"AutoConfig": f"{code}.{config}"}, text_name: {**_TEXT, **text}, **more}
        (folder / "config.json").write_text(json.dumps(stated))

    return write


def _kimi(kind: str, config: str, text: dict[str, Any]) -> Callable[[Path], None]:
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    latent |= {"num_key_value_heads": 4, "attention_bias": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    routing = {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1}
    routing |= {"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "seq_aux": True}
    routing |= {"norm_topk_prob": True, "routed_scaling_factor": 2.446, "aux_loss_alpha": 0.001, **_EXPERTS}
    vision = {"patch_size": 14, "merge_kernel_size": [2, 2]}
    own = {"model_type": kind, "vision_config": vision, "media_placeholder_token_id": 3}
    return _from_hub(f"modeling_{kind}", config, "text_config", {**latent, **routing, **_UNTIED, **text}, **own)


def _internvl_chat(folder: Path) -> None:
    tokenizer = tiny_hf.tokenizer_of(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>"]})
    tokenizer.save_pretrained(folder)
    text = {"model_type": "qwen2", "vocab_size": 512, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    vision = {"hidden_size": 32, "patch_size": 14, "image_size": TILE}
    kind = {"model_type": "internvl_chat", "vision_config": vision}
    _from_hub("modeling_internvl_chat", "InternVLChatConfig", "llm_config", text, **kind)(folder)


def _context_token(config: Any) -> int:
    return AutoTokenizer.from_pretrained(config.name_or_path).convert_tokens_to_ids("<IMG_CONTEXT>")


def _with_grid(generator: torch.Generator) -> dict[str, torch.Tensor]:
    patches = torch.randn(24, 3 * 2 * tiny_hf.PATCH**2, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([GRID])}


def _of_one_frame(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(24, 3 * 14**2, generator=generator),
        "image_grid_thw": torch.tensor([GRID]),
    }


def _two_tiles(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, TILE, TILE, generator=generator)}


def _row_by_row(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(24, 3, 14, 14, generator=generator), "image_grid_hws": torch.tensor([GRID[1:]])}


def _of_frames(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(24, 3, 14, 14, generator=generator), "grid_thws": torch.tensor([GRID])}


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        write: writes the folder.
        picture: what a row with a picture brings.
        visual: positions that it has in the row.
        token: the placeholder's id, by the configuration.
        kind: mcore-bridge's name of it, where the model type does not tell.
        has_axes: whether positions have three axes (mRoPE).
        has_experts: whether layers have experts.
        is_first: whether all is run with context parallelism; else what differs between families.
        trains_alike: whether it trains in TP2 as on one rank; False: it does not without ReGATE either.
    """

    write: Callable[[Path], None]
    picture: Callable[[torch.Generator], dict[str, torch.Tensor]] = _with_grid
    visual: int = 6
    token: Callable[[Any], int] = attrgetter("image_token_id")
    kind: str | None = None
    has_axes: bool = True
    has_experts: bool = False
    is_first: bool = False
    trains_alike: bool = True


_KIMI = {"token": attrgetter("media_placeholder_token_id"), "has_axes": False}
_KIMI |= {"has_experts": True, "trains_alike": False}
_TILES = {"picture": _two_tiles, "visual": 8, "has_axes": False}
FAMILIES = {
    "qwen25": Family(_qwen("qwen2_5_vl"), is_first=True),
    "qwen3": Family(_qwen("qwen3_vl"), is_first=True, trains_alike=False),
    "qwen3_moe": Family(
        _saved(
            Qwen3VLMoeConfig,
            {"head_dim": 8, "num_experts": 4, "rope_parameters": _sections(2, 1, 1, mrope_interleaved=True), **_EXPERTS}
            | _UNTIED,
            {**_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32}
            | {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64},
            **_IDS,
            **_UNTIED,
        ),
        has_experts=True,
        trains_alike=False,
    ),
    "qwen2": Family(
        _saved(
            Qwen2VLConfig,
            {"rope_parameters": _sections(1, 1, 2)},
            {**_VISION, "embed_dim": 32, "hidden_size": 32},
            **_IDS,
        )
    ),
    # Packed rows are longer than that, none of their samples is.
    "internvl": Family(_internvl("qwen2", max_position_embeddings=24), **_TILES),
    "internvl_qwen3": Family(_internvl("qwen3", head_dim=8), **_TILES),
    "internvl_chat": Family(_internvl_chat, token=_context_token, **_TILES),
    "llava_onevision": Family(
        _from_hub(
            "modeling_llavaonevision1_5",
            "Llavaonevision1_5Config",
            "text_config",
            {"head_dim": 8},
            model_type="llavaonevision1_5",
            vision_config={},
            image_token_id=3,
            video_token_id=4,
        ),
        picture=_of_one_frame,
        has_axes=False,
        kind="llava_onevision1_5",
    ),
    "glm4v": Family(_glm(Glm4vConfig)),
    "glm4v_moe": Family(
        _glm(Glm4vMoeConfig, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, **_EXPERTS),
        has_experts=True,
        trains_alike=False,
    ),
    # Latent attention, a dense layer, then experts. Kimi-VL-A3B's queries have no latent; Kimi-K2.5's have one.
    "kimi": Family(
        _kimi("kimi_vl", "KimiVLConfig", {"q_lora_rank": None, "rope_theta": 800000.0, "rope_scaling": None}),
        picture=_row_by_row,
        **_KIMI,
    ),
    "kimi_k25": Family(
        _kimi("kimi_k25", "KimiK25Config", {"q_lora_rank": 16, "rope_theta": 50000.0, "rope_scaling": _YARN}),
        picture=_of_frames,
        **_KIMI,
    ),
}
# Rows are longer than its configuration says: the frequencies of its RoPE would depend on their length.
TOO_LONG = Family(_internvl("qwen2", max_position_embeddings=16), **_TILES)
