"""What is in a checkpoint of any format, read from indices and headers (legacy files: weights-only)."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.legacy import find_legacy
from regate_megatron.checkpoints.safetensors_folder import CONFIG, SafetensorsFolder
from regate_megatron.checkpoints.targets import TRACKER
from regate_megatron.checkpoints.torch_dist import TorchDistReader
from regate_megatron.checkpoints.weights import open_weights
from regate_megatron.errors import refuse

STATE_PREFIX = "regate"  # of what this package keeps in checkpoints beside the model
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_STACK = re.compile(r"(.*\blayers\.)(\D.*)")
# Beginnings of names, by what they belong to; in torch_dist the model's names come bare, everything else prefixed.
PARTS = {
    "language model": (
        *("embedding.", "decoder.", "output_layer.", "language_model.", "model.language_model."),
        *("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    ),
    "vision tower": ("vision_model.", "vision_tower.", "model.vision_tower.", "visual.", "model.visual."),
    "projector": ("vision_projection.", "multi_modal_projector.", "model.multi_modal_projector.", "mlp1."),
    "optimizer": ("optimizer.", "chained_"),
    "ReGATE state": (STATE_PREFIX,),
}
_MODEL_PARTS = ("language model", "vision tower", "projector", "other")
_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("padded_vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings", "seq_length", "normalization"),
    *("layernorm_epsilon", "rotary_base", "rotary_percent", "swiglu", "add_qkv_bias", "qk_layernorm"),
    *("untie_embeddings_and_output_weights", "num_experts", "bf16", "fp16", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "tokenizer_type", "tokenizer_model"),
)


@dataclass(frozen=True)
class Group:
    """Tensors that differ in the number of their layer only.

    Attributes:
        name: with ``{}`` for the number.
        count: how many there are.
        shape: of each.
        dtype: of their elements, as in "bfloat16".
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Report:
    """What was found.

    Attributes:
        path: folder of the iteration, or the Hugging Face folder.
        format: "torch_dist", "torch" or "safetensors".
        iteration: what the tracker file says; None without one.
        layout: what is known of the layout, in words.
        arguments: Megatron's arguments of interest, or those of ``config.json``.
        parts: what belongs to what: part -> groups of tensors.
        objects: names of what is no tensor, extra states aside.
    """

    path: Path
    format: str
    iteration: str | None
    layout: str
    arguments: dict[str, Any]
    parts: dict[str, list[Group]] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Elements of the model's tensors: no optimizer, none of ours."""
        groups = [group for part in _MODEL_PARTS for group in self.parts.get(part, ())]
        return sum(group.count * torch.Size(group.shape).numel() for group in groups)


def inspect_checkpoint(folder: str | Path, what: str = "--source") -> Report:
    """Describe a checkpoint; nothing is loaded onto a device. One process, no communication.

    Raises:
        ReGateError: there is none, or it is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise refuse(what, given=f"{root}, which is no folder", allowed="a checkpoint folder", change="the path")
    tracker = root / TRACKER
    iteration = tracker.read_text(errors="replace").strip() if tracker.is_file() else None
    if iteration is None and (root / CONFIG).is_file() and not (root / "metadata.json").is_file():
        return _safetensors(root, what)
    if find_legacy(root):
        return _legacy(root, iteration, what)
    return _torch_dist(root, iteration, what)


def _torch_dist(root: Path, iteration: str | None, what: str) -> Report:
    reader = TorchDistReader(root, what)
    report = Report(reader.path, "torch_dist", iteration, "any layout loads it", _of_interest(reader.arguments()))
    for name, shape in reader.shapes.items():
        stack = _STACK.match(name)
        stacked = stack and not _NUMBER.search(name) and shape
        group = Group(f"{stack[1]}{{}}.{stack[2]}", shape[0], shape[1:], "") if stacked else Group(name, 1, shape, "")
        _add(report, Group(group.name, group.count, group.shape, _word(reader.dtype(name))))
    names = {name.split("/shard_")[0] for name in reader.objects}
    report.objects = sorted(name for name in names if not name.endswith("_extra_state") and name != "common_state")
    if any(name.startswith(STATE_PREFIX) for name in report.objects):
        report.parts.setdefault("ReGATE state", [])
    return report


def _legacy(root: Path, iteration: str | None, what: str) -> Report:
    found = open_weights(root, what)
    layout = f"TP{found.layout[0]} PP{found.layout[1]}"
    report = Report(found.path, "torch", iteration, layout, _of_interest(found.arguments))
    _add_all(report, {name: (weight.shape, weight.dtype) for name, weight in found.weights.items()})
    return report


def _safetensors(root: Path, what: str) -> Report:
    folder = SafetensorsFolder(root, what)
    shown = {key: value for key, value in folder.config.items() if not isinstance(value, dict | list)}
    report = Report(root, "safetensors", None, "no layout", shown)
    _add_all(report, {name: (folder.shape(name), folder.dtype(name)) for name in sorted(folder.names)})
    return report


def _add_all(report: Report, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    groups: dict[tuple, int] = {}
    for name, (shape, dtype) in tensors.items():
        key = (_NUMBER.sub("{}", name), shape, _word(dtype))
        groups[key] = groups.get(key, 0) + 1
    for (name, shape, dtype), count in groups.items():
        _add(report, Group(name, count, shape, dtype))


def _add(report: Report, group: Group) -> None:
    part = next((part for part, beginnings in PARTS.items() if group.name.startswith(beginnings)), "other")
    report.parts.setdefault(part, []).append(group)


def _of_interest(arguments: Namespace) -> dict[str, Any]:
    return {name: value for name in _ARGUMENTS if (value := getattr(arguments, name, None)) is not None}


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
