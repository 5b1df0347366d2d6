"""The language model in a Hugging Face folder, alone or inside a vision-language model, checked against its config.

Vision-language models name it in several ways, by model and by the version of transformers that saved it; here it
always has the names of a causal language model. The other tensors are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.families import FAMILIES, Architecture, allowed_families
from regate_megatron.checkpoints.hf_config import from_config, text_config
from regate_megatron.checkpoints.names import LM_HEAD, InFolder, rules_for
from regate_megatron.checkpoints.safetensors_folder import SafetensorsFolder
from regate_megatron.errors import refuse

# What stands for "model." and for "lm_head." in the folder.
_PREFIXES = (
    ("model.", "lm_head."),  # a causal language model; Qwen2-VL and Qwen2.5-VL before transformers 4.52
    ("language_model.model.", "language_model.lm_head."),  # LLaVA before 4.52; InternVL's own code
    ("model.language_model.", "lm_head."),  # all since 4.52
    ("language_model.", "lm_head."),  # a vision-language model saved without its head
    ("", "lm_head."),  # a language model saved without its head
)
_WORDS = "embed_tokens.weight"
_BUFFER = "rotary_emb.inv_freq"  # old releases stored it; it follows from the config


@dataclass(frozen=True)
class TextModel(InFolder):
    """A language model to be converted.

    Attributes:
        folder: where its tensors are.
        config: its own configuration (not that of the whole).
        architecture: what the configuration says.
        inside: whether it lies inside a vision-language model.
        prefix: what stands for "model." and "lm_head." in the folder.
    """

    folder: SafetensorsFolder
    config: dict[str, Any]
    architecture: Architecture
    inside: bool
    prefix: tuple[str, str]

    def stored(self, name: str) -> str:
        """The name in the folder of a causal language model's tensor."""
        if name == LM_HEAD:
            return self.prefix[1] + "weight"
        return self.prefix[0] + name.removeprefix("model.")


def open_text_model(path: str | Path, *, inside: bool) -> TextModel:
    """Open the language model of a Hugging Face folder; reads the config and headers only.

    Args:
        inside: whether it is to be taken out of a vision-language model.

    Raises:
        ReGateError: no such model, another family, or tensors that are missing, unknown or of another shape.
    """
    folder = SafetensorsFolder(path)
    prefix = next((pair for pair in _PREFIXES if pair[0] + _WORDS in folder.names), None)
    config = text_config(folder.config, has_head=prefix is not None and prefix[1] + "weight" in folder.names)
    is_inside = config is not folder.config or config.get("model_type") not in FAMILIES
    if is_inside and not inside and "vision_config" in folder.config:
        raise refuse(
            "--source",
            given=f"{path}, a {folder.config.get('model_type')!r}",
            allowed=f"a causal language model ({allowed_families()})",
            change="the command: take its language model out with tools/extract_teacher.py",
        )
    architecture = from_config(config)
    if prefix is None:
        given = f"{path}, which holds no {_WORDS}"
        raise refuse("--source", given=given, allowed=f"a dense {allowed_families()}", change="the path")
    model = TextModel(folder, config, architecture, is_inside, prefix)
    _check_tensors(model)
    return model


def _check_tensors(model: TextModel) -> None:
    """Every tensor of the table is there with its shape, and none of the model's tensors is left over."""
    names, wanted = model.folder.names, {}
    for rule in rules_for(model.architecture):
        shapes = rule.shapes(model.architecture)
        for layer in model.layers(rule):
            wanted |= dict(zip(model.sources(rule, layer), shapes, strict=True))
    path = model.folder.path
    for name, shape in wanted.items():
        if name not in names:
            allowed = "all tensors that its config implies"
            raise refuse("--source", given=f"{path}, which lacks {name}", allowed=allowed, change="it")
        found = model.folder.shape(name)
        if found != shape:
            vocabulary = found[1:] == shape[1:] and name.endswith((_WORDS, LM_HEAD))
            raise refuse(
                "--source",
                given=f"{path} with a vocabulary of {found[0]} in {name}"
                if vocabulary
                else f"{path} with {name} of shape {found}",
                allowed=f"the config's vocabulary of {shape[0]}" if vocabulary else f"the config's {shape}",
                change="vocab_size in config.json" if vocabulary else "config.json or the weights, whichever is wrong",
            )
    left = {name for name in names if _own(model, name)} - set(wanted)
    head, words = model.stored(LM_HEAD), model.stored("model.embed_tokens.weight")
    if head in left and torch.equal(model.folder.read(head), model.folder.read(words)):
        left.discard(head)  # tied, and stored twice
    if left := sorted(name for name in left if not name.endswith(_BUFFER)):
        given = f"{path} with {left[0]}" + (f" and {len(left) - 1} more tensors" if len(left) > 1 else "")
        allowed = f"only tensors of a dense {model.architecture.family.name} of its config"
        given += " that have no place in Megatron's GPT"
        raise refuse("--source", given=given, allowed=allowed, change="the model")


def _own(model: TextModel, name: str) -> bool:
    """Whether a tensor belongs to the language model."""
    if not model.inside:
        return True
    return name.startswith(model.prefix[0]) or name == model.stored(LM_HEAD)
