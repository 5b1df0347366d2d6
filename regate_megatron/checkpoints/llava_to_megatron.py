"""A Hugging Face LLaVA as a Megatron LLaVAModel: CLIP's tower up to the layer in use, projector, language model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from regate_megatron.checkpoints.clip import PROJECTOR, TOWER, UNUSED_NORM, Clip, clip_rules, from_llava_config
from regate_megatron.checkpoints.names import InFolder
from regate_megatron.checkpoints.safetensors_folder import SafetensorsFolder, companions_of
from regate_megatron.checkpoints.text_model import TextModel, open_text_model
from regate_megatron.checkpoints.to_megatron import ToMegatron, pieces_of, plan_to_megatron
from regate_megatron.errors import refuse
from regate_megatron.teacher.weights import LANGUAGE_MODEL_PREFIX, local_name

# What stands for TOWER and PROJECTOR in the folder, by the version of transformers that saved it.
_TOWERS = (TOWER, f"model.{TOWER}", "model.vision_tower.", "vision_tower.")
_PROJECTORS = (f"model.{PROJECTOR}", PROJECTOR)


@dataclass(frozen=True)
class Vision(InFolder):
    """The tower and the projector in a Hugging Face folder.

    Attributes:
        folder: where the tensors are.
        architecture: what they are.
        tower: what stands for ``TOWER`` in the folder.
        projector: what stands for ``PROJECTOR``.
    """

    folder: SafetensorsFolder
    architecture: Clip
    tower: str
    projector: str

    def stored(self, name: str) -> str:
        """The name in the folder."""
        if name.startswith(PROJECTOR):
            return self.projector + name.removeprefix(PROJECTOR)
        return self.tower + name.removeprefix(TOWER)


def open_vision(model: TextModel) -> Vision:
    """Open tower and projector beside a LLaVA's language model; reads headers only.

    Raises:
        ReGateError: another model, or tensors that are missing, unknown or of another shape.
    """
    folder = model.folder
    clip = from_llava_config(folder.config, model.architecture.hidden_size)
    found = [
        next((start for start in starts if any(name.startswith(start) for name in folder.names)), starts[0])
        for starts in (_TOWERS, _PROJECTORS)
    ]
    vision = Vision(folder, clip, *found)
    left = {name for name in folder.names if name.startswith((vision.tower, vision.projector))}
    for rule in clip_rules(clip):
        for layer in vision.layers(rule):
            for name, shape in zip(vision.sources(rule, layer), rule.shapes(clip), strict=True):
                if name not in left or folder.shape(name) != shape:
                    given = f"{name} of shape {folder.shape(name)}" if name in left else f"no {name}"
                    given = f"{folder.path} with {given}"
                    raise refuse("--source", given=given, allowed=f"the config's {shape}", change="config.json")
                left.discard(name)
    unused = (
        vision.stored(UNUSED_NORM),
        *(vision.stored(f"{TOWER}encoder.layers.{n}.") for n in unused_layers(vision)),
    )
    if left := sorted(name for name in left if not name.startswith(unused) and not name.endswith("position_ids")):
        given = f"{folder.path} with {left[0]}"
        allowed = "only tensors of CLIP and a projector of two layers"
        raise refuse("--source", given=given, allowed=allowed, change="the model")
    return vision


def unused_layers(vision: Vision) -> range:
    """The tower's layers whose output LLaVA does not use."""
    config = vision.folder.config.get("vision_config") or {}
    return range(vision.architecture.num_layers, config.get("num_hidden_layers", 12))


def plan_llava_to_megatron(
    source: str | Path,
    *,
    tensor_size: int = 1,
    divisor: int = 128,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[ToMegatron, Vision]:
    """Plan the conversion; reads headers only.

    Args:
        source: a Hugging Face LLaVA.
        tensor_size: as for :func:`plan_to_megatron`.
        divisor: as there.
        dtype: as there.
        implementation: "local" names the norms as Megatron's local layers do, else as Transformer Engine's.

    Raises:
        ReGateError: another model, or a variant that Megatron cannot express.
    """
    model = open_text_model(source, inside=True)
    vision = open_vision(model)
    text = plan_to_megatron(model, tensor_size=tensor_size, divisor=divisor, dtype=dtype)
    pieces = [dataclasses.replace(piece, name=LANGUAGE_MODEL_PREFIX + piece.name) for piece in text.pieces]
    pieces += [piece for rule in clip_rules(vision.architecture) for piece in pieces_of(vision, rule, 0, dtype)]
    if implementation == "local":
        pieces = [dataclasses.replace(piece, name=local_name(piece.name)) for piece in pieces]
    clip, arguments = vision.architecture, text.arguments
    arguments.vision_model_type = "clip"
    arguments.img_h = arguments.img_w = clip.image_size
    arguments.patch_dim = clip.patch_size
    arguments.disable_vision_class_token = not clip.keeps_class_token
    companions = companions_of(model.folder.path, images=True)
    plan = dataclasses.replace(text, pieces=pieces, config=model.folder.config, companions=companions)
    return plan, vision
