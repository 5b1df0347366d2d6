"""A Megatron LLaVAModel as a Hugging Face LLaVA: vision tower, projector and language model.

It can be one where the tower is CLIP's and the projector two linear layers as wide as the language model. No checkpoint
says what image token, activation and heads the tower was trained with: they come from a Hugging Face LLaVA that is like
it. The result always uses the output of its last layer (``vision_feature_layer`` -1): Megatron's tower ends there.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.clip import (
    MEGATRON_PROJECTOR,
    MEGATRON_TOWER,
    PROJECTOR_RULES,
    TOWER_RULES,
    UNUSED_NORM,
    Clip,
    clip_rules,
    from_llava_config,
)
from regate_megatron.checkpoints.names import merged_shape
from regate_megatron.checkpoints.safetensors_folder import companions_of, read_config
from regate_megatron.checkpoints.to_huggingface import (
    Output,
    ToHuggingFace,
    outputs_of,
    plan_to_huggingface,
    template_of,
)
from regate_megatron.errors import refuse
from regate_megatron.teacher.weights import canonical_name

_FC1, _FC2 = (
    f"{MEGATRON_TOWER}decoder.layers.mlp.linear_fc1.weight",
    f"{MEGATRON_TOWER}decoder.layers.mlp.linear_fc2.weight",
)
_POSITIONS = f"{MEGATRON_TOWER}position_embeddings.weight"
_PROJECTOR_FC1 = f"{MEGATRON_PROJECTOR}encoder.linear_fc1"
_OPTIONAL = {rule.megatron for rule in PROJECTOR_RULES if rule.megatron.endswith("bias")}
PARTS = ("all", "language-model")


def plan_student(
    source: str | Path,
    *,
    part: str | None = None,
    like: str | Path | None = None,
    family: str | None = None,
    vocab_size: int | None = None,
) -> tuple[ToHuggingFace, str | None]:
    """Plan the export of a student; reads the index and the arguments only.

    Args:
        source: a torch_dist checkpoint.
        part: "all", "language-model"; None: all where there is a Hugging Face model like it, else the language model.
        like: as for :func:`plan_to_huggingface`; of a whole LLaVA it must be a LLaVA.
        family: as there.
        vocab_size: as there.

    Returns:
        The plan, and why it is not all of the student; None where it is, or was not wanted.

    Raises:
        ReGateError: see :func:`plan_to_huggingface`; a whole student that cannot be one, or does not fit ``like``.
    """
    text = plan_to_huggingface(source, like=like, family=family, vocab_size=vocab_size)
    if part == "language-model" or (part is None and not _vision_shapes(text)):
        return text, None
    template = template_of(source, like, family)
    config = read_config(template, "--like") if template else {}
    saved = text.reader.arguments()
    reason = _no_equivalent(text, saved) or _no_template(config)
    if reason is None:
        return _whole(text, saved, template, config), None
    if part == "all":
        raise refuse(
            "--part",
            given=f"all for {text.reader.path}, {reason}",
            allowed="a LLaVAModel with CLIP's tower and a projector of two layers, and --like to a Hugging Face LLaVA",
            change="it to language-model" if "--like" not in reason else "--like, or --part to language-model",
        )
    return text, reason


def _no_equivalent(text: ToHuggingFace, saved: Namespace) -> str | None:
    """Why no Hugging Face LLaVA computes what this model does."""
    shapes = _vision_shapes(text)
    if not shapes:
        return "which holds no vision tower"
    kind = getattr(saved, "vision_model_type", None) or "clip"
    for name, found in (
        ("--vision-model-type " + kind, kind != "clip"),
        *((f"--{name.replace('_', '-')}", getattr(saved, name, False)) for name in ("pixel_shuffle", "use_tile_tags")),
        ("--use-tiling", getattr(saved, "use_tiling", False)),
        ("images that are not square", getattr(saved, "img_h", None) != getattr(saved, "img_w", None)),
    ):
        if found:
            return f"trained with {name}, which a Hugging Face LLaVA does not have"
    wanted = {rule.megatron for rule in (*TOWER_RULES, *PROJECTOR_RULES)}
    if lost := [name for name in sorted(wanted) if name not in shapes and name not in _OPTIONAL]:
        return f"whose vision model is not CLIP's: it has no {lost[0]}"
    if more := sorted(set(shapes) - wanted):
        return f"whose vision model is not CLIP's: it has {more[0]}"
    if shapes[_FC1][1] != shapes[_FC2][2]:
        return "whose vision model is not CLIP's: its feed-forward layers are gated"
    width = shapes[f"{_PROJECTOR_FC1}.weight"][0]
    if width != text.architecture.hidden_size:
        return f"whose projector is {width} wide inside: Hugging Face's is as wide as the language model"
    return None


def _no_template(config: dict[str, Any]) -> str | None:
    if config.get("model_type") == "llava":
        return None
    return "without --like to a Hugging Face LLaVA, which knows image token, heads and activation of the tower"


def _vision_shapes(text: ToHuggingFace) -> dict[str, tuple[int, ...]]:
    """Shapes of tower and projector, norms named as Transformer Engine names them."""
    return {
        canonical_name(name): shape
        for name, shape in text.reader.shapes.items()
        if name.startswith((MEGATRON_TOWER, MEGATRON_PROJECTOR)) and not name.endswith("_extra_state")
    }


def _whole(text: ToHuggingFace, saved: Namespace, template: Path, config: dict[str, Any]) -> ToHuggingFace:
    shapes = _vision_shapes(text)
    clip = from_llava_config(config, text.architecture.hidden_size)
    dropped = getattr(saved, "disable_vision_class_token", not clip.keeps_class_token)
    clip = dataclasses.replace(
        clip,
        num_layers=shapes[_FC1][0],
        keeps_class_token=not dropped,
        projector_bias=f"{_PROJECTOR_FC1}.bias" in shapes,
    )
    _check_like(clip, shapes, template)
    image_token = config.get("image_token_index", 32000)
    if not isinstance(image_token, int) or image_token >= text.architecture.vocab_size:
        raise refuse(
            "--like",
            given=f"{template} with image_token_index {image_token} for a vocabulary of {text.architecture.vocab_size}",
            allowed="a row of the embedding",
            change="it, or keep one more row with --vocab-size",
        )
    stored = {canonical_name(name): name for name in text.reader.shapes}
    outputs = [
        *outputs_of(text.reader, clip_rules(clip), clip, stored.__getitem__),
        _unused_norm(clip, text.reader.dtype(_POSITIONS)),
        *(
            dataclasses.replace(o, shapes={f"language_model.{name}": shape for name, shape in o.shapes.items()})
            for o in text.outputs
        ),
    ]
    return dataclasses.replace(
        text, outputs=outputs, config=_config(clip, text, config), companions=companions_of(template, images=True)
    )


def _check_like(clip: Clip, shapes: dict[str, tuple[int, ...]], template: Path) -> None:
    for rule in clip_rules(clip):
        want = merged_shape(rule, clip, 0)
        want = (clip.num_layers, *want) if rule.per_layer else want
        if shapes[rule.megatron] != want:
            raise refuse(
                "--like",
                given=f"{template}, by whose config {rule.megatron} has the shape {want}",
                allowed=f"the checkpoint's {shapes[rule.megatron]}",
                change="it to the LLaVA the student was made from",
            )


def _unused_norm(clip: Clip, dtype: torch.dtype) -> Output:
    """The norm that Hugging Face builds and LLaVA does not use: the identity."""
    shape = (clip.hidden_size,)
    return Output(
        {f"{UNUSED_NORM}.weight": shape, f"{UNUSED_NORM}.bias": shape},
        dtype,
        lambda: [torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)],
    )


def _config(clip: Clip, text: ToHuggingFace, like: dict[str, Any]) -> dict[str, Any]:
    own = {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if clip.keeps_class_token else "default",
        "image_seq_length": clip.num_embeddings,
        "multimodal_projector_bias": clip.projector_bias,
        "vision_config": {"model_type": "clip_vision_model"}
        | (like.get("vision_config") or {})
        | {"num_hidden_layers": clip.num_layers},
        "text_config": text.config,
        "tie_word_embeddings": text.architecture.tied,
    }
    if "vocab_size" in like:  # older releases say it twice
        own["vocab_size"] = text.architecture.vocab_size
    for name in ("torch_dtype", "dtype"):
        if name in like:
            own[name] = str(
                text.reader.dtype(text.language_model.prefix + "embedding.word_embeddings.weight")
            ).removeprefix("torch.")
    return like | own
