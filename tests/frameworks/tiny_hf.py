"""Folders as Hugging Face has them, with everything but weights: the family's own keys, sizes that a CPU can do.

The tokenizer is trained on the spot on a few sentences; the vision towers take patches of 28 pixels, so that the least
picture that Qwen's processors make (200,704 pixels) has 64 visual positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLProcessor
from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

PATCH = 28
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SPECIAL += ("<|video_pad|>", "<|vision_pad|>")
SENTENCES = (
    "a red circle above a blue square",
    "two green triangles beside a yellow star",
    "nothing but noise in many colours",
    "Describe the picture. user assistant system",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": PATCH}
_IMAGES = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}


def write(folder: Path, family: str) -> None:
    """Write configuration, tokenizer and processor of ``qwen2_5_vl`` or ``qwen3_vl``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    ids = {
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
    }
    vocabulary = {"vocab_size": -(-len(tokenizer) // 16) * 16}
    images = Qwen2VLImageProcessor(**_IMAGES)
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        text = {**TEXT, **vocabulary, "rope_parameters": rope}
        vision = {**_VISION, "out_hidden_size": 32, "window_size": 112, "fullatt_block_indexes": [3]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        architecture, videos = "Qwen2_5_VLForConditionalGeneration", Qwen2VLVideoProcessor(**_IMAGES)
        processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
    else:
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
        text = {**TEXT, **vocabulary, "rope_parameters": rope, "head_dim": 8}
        vision = {
            **_VISION,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 64,
        }
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        architecture, videos = "Qwen3VLForConditionalGeneration", Qwen3VLVideoProcessor(**_IMAGES)
        processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_pictures(folder: Path, count: int = 8) -> Path:
    """Pictures of noise with a sentence each, as JSON lines of ``image`` and ``text``; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, rows = np.random.default_rng(0), []
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(noise.integers(0, 256, (448, 448, 3), dtype=np.uint8)).save(path)
        words = SENTENCES[index % 3].split()
        rows.append({"image": str(path), "text": " ".join(words[index % 2 :] * (1 + index % 3))})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tokenizer_of(folder: Path) -> Any:
    """Train a tokenizer and write it into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=400, min_frequency=1)
    trained.save_model(str(folder))
    tokenizer = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=[],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer
