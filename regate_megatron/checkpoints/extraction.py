"""The language model of a vision-language model by itself, bit for bit: out of a Megatron checkpoint or a Hugging Face
folder.

Of a Megatron checkpoint every tensor and object whose name starts with ``language_model.`` (its optimizer state's names
do not) is copied piece by piece as it is stored, and with it the common state, from which Megatron's loader takes its
arguments: no model is built, the vision tower is not read, objects are not unpickled. The copy is marked "release":
loaders start it at iteration 0 and ask for neither optimizer nor random state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.names import rules_for
from regate_megatron.checkpoints.safetensors_folder import write_companions, write_safetensors
from regate_megatron.checkpoints.text_model import TextModel, open_text_model
from regate_megatron.checkpoints.to_megatron import alone_config
from regate_megatron.checkpoints.torch_dist import COMMON_FILE, RELEASE, Piece, TorchDistReader, write_torch_dist
from regate_megatron.errors import refuse
from regate_megatron.teacher.stated import SETTINGS_FILES
from regate_megatron.teacher.weights import EMBEDDING, LANGUAGE_MODEL_PREFIX

_COMMON_STATE = "common_state/"  # an object inside the checkpoint since megatron-core 0.19, before that a file


@dataclass(frozen=True)
class MegatronExtraction:
    """What there is to copy of a Megatron checkpoint.

    Attributes:
        reader: the checkpoint.
        pieces: of the language model's tensors, under their new names.
        objects: names of what is stored beside tensors, in the copy -> in the source.
    """

    reader: TorchDistReader
    pieces: list[Piece]
    objects: dict[str, str]

    @property
    def source(self) -> Path:
        """The folder of the checkpoint's iteration."""
        return self.reader.path

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to be written."""
        return sum(piece.num_bytes for piece in self.pieces)

    def fill(self, folder: Path, progress: Callable[[int], Any]) -> None:
        """Write the checkpoint; see :class:`writing.Plan`."""
        objects = {name: self.reader.read_object(old) for name, old in self.objects.items()}
        write_torch_dist(folder, self.pieces, objects=objects, common=None, progress=progress)
        for name in (COMMON_FILE, *SETTINGS_FILES):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / RELEASE / name)

    def __str__(self) -> str:
        """What is copied, for people."""
        dtypes = sorted({str(piece.dtype).removeprefix("torch.") for piece in self.pieces})
        elements = sum(torch.Size(piece.shape).numel() for piece in self.pieces)
        return (
            f"language model in {self.source}: {len({piece.name for piece in self.pieces})} tensors, {elements:,} "
            f"parameters ({', '.join(dtypes)}), {self.num_bytes / 1e6:,.1f} MB"
        )


def plan_megatron_extraction(source: str | Path) -> MegatronExtraction:
    """Find the language model in a torch_dist checkpoint of a LLaVAModel; reads the index only.

    Raises:
        ReGateError: no checkpoint, another format, or no language model beside a vision tower in it.
    """
    reader = TorchDistReader(source)
    if LANGUAGE_MODEL_PREFIX + EMBEDDING not in reader.shapes:
        is_gpt, path = EMBEDDING in reader.shapes, reader.path
        raise refuse(
            "--source",
            given=f"{path}, which is a language model already" if is_gpt else f"{path}, which holds no language model",
            allowed=f"a checkpoint of a LLaVAModel (it has {LANGUAGE_MODEL_PREFIX}{EMBEDDING})",
            change="nothing: name it as the teacher as it is" if is_gpt else "the path",
        )
    pieces = [piece for name in reader.shapes if (new := _new_name(name)) for piece in reader.pieces(name, new)]
    return MegatronExtraction(reader, pieces, {new: name for name in reader.objects if (new := _new_name(name))})


def _new_name(name: str) -> str | None:
    """The name in the copy; None for what stays behind."""
    if name.startswith(_COMMON_STATE):
        return name
    return name.removeprefix(LANGUAGE_MODEL_PREFIX) if name.startswith(LANGUAGE_MODEL_PREFIX) else None


@dataclass(frozen=True)
class HuggingFaceExtraction:
    """What there is to copy of a Hugging Face folder: a causal language model of its own.

    Attributes:
        model: the language model inside the other.
        names: a causal language model's names -> names in the source.
    """

    model: TextModel
    names: dict[str, str]

    @property
    def source(self) -> Path:
        """The Hugging Face folder."""
        return self.model.folder.path

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its new name."""
        folder = self.model.folder
        return {
            name: torch.Size(folder.shape(old)).numel() * folder.dtype(old).itemsize for name, old in self.names.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes to be written."""
        return sum(self.sizes.values())

    def fill(self, folder: Path, progress: Callable[[int], Any]) -> None:
        """Write the language model, a config of its own and the tokenizer; see :class:`writing.Plan`."""
        source = self.model.folder
        tensors = ((name, source.read(old).contiguous()) for name, old in self.names.items())
        write_safetensors(folder, self.sizes, tensors, progress=progress)
        config = alone_config(self.model, source.dtype(next(iter(self.names.values()))))
        write_companions(folder, source.companions(), config)

    def __str__(self) -> str:
        """What is copied, for people."""
        return (
            f"language model in {self.source}: {self.model.architecture.family.name}, {len(self.names)} of "
            f"{len(self.model.folder.names)} tensors, {self.num_bytes / 1e6:,.1f} MB"
        )


def open_inner_model(source: str | Path) -> TextModel:
    """The language model of a LLaVA, Qwen2-VL, Qwen2.5-VL, InternVL or similar; headers only.

    Raises:
        ReGateError: see ``text_model.open_text_model``; or the source is a language model already.
    """
    model = open_text_model(source, inside=True)
    if not model.inside:
        raise refuse(
            "--source",
            given=f"{source}, which is a language model already",
            allowed="a vision-language model",
            change="the command: convert it as it is with tools/convert_hf_teacher.py",
        )
    return model


def plan_huggingface_extraction(model: TextModel) -> HuggingFaceExtraction:
    """List what is to be copied, in the order of writing."""
    order: dict[str, str] = {}
    rules = sorted(rules_for(model.architecture), key=lambda rule: (rule.megatron != EMBEDDING, not rule.per_layer))
    for rule in rules:
        for layer in model.layers(rule):
            names = [name.format(layer) for name in rule.sources]
            order |= dict(zip(names, model.sources(rule, layer), strict=True))
    return HuggingFaceExtraction(model, order)
