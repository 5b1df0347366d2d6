"""How Megatron lays a model out over tensor- and pipeline-parallel ranks, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from regate_megatron.errors import refuse
from regate_megatron.teacher.checkpoint import NORM_NAMES

LAYER = re.compile(r"(?P<stack>.*\blayers\.)(?P<number>\d+)\.(?P<rest>.+)")
_COLUMN = re.compile(r"(linear_qkv|linear_fc1)\.(weight|bias)$|word_embeddings\.weight$|output_layer\.weight$")
_ROW = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_WHOLE = re.compile(
    r"(layernorm|ln_pre|ln_post|conv1)\.(weight|bias)$|layer_norm_(weight|bias)$|(linear_proj|linear_fc2)\.bias$"
    r"|class_token$|position_embeddings\.weight$"
)
_GATED = re.compile(r"linear_fc1\.(weight|bias)$")
_FIRST = re.compile(r"(language_model\.)?embedding\.|vision_model\.|vision_projection\.")
_LAST = re.compile(r"(language_model\.)?(output_layer\.|decoder\.final_layernorm\.)")
_MAIN_STACK = re.compile(r"(language_model\.)?decoder\.layers\.$")


def split_axis(name: str, what: str = "--source") -> int | None:
    """The axis along which tensor-parallel ranks share a tensor; None: each has the whole.

    Raises:
        ReGateError: a tensor that is not known here (experts, state-space layers, adapters).
    """
    if _COLUMN.search(name):
        return 0
    if _ROW.search(name):
        return 1
    if _WHOLE.search(name):
        return None
    raise refuse(
        what,
        given=f"a checkpoint with {name}",
        allowed="dense GPTModel and LLaVAModel, whose layout is known by name",
        change="the checkpoint, or let Megatron itself load and save it",
    )


def is_gated(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor holds a gate and its values one after the other, so that each is split by itself.

    Args:
        shapes: of all tensors, by name: the second linear layer has as many columns as there are values.
    """
    if not _GATED.search(name):
        return False
    return shapes[name][0] == 2 * shapes[_GATED.sub("linear_fc2.weight", name)][1]


def shard(value: torch.Tensor, axis: int | None, gated: bool, rank: int, size: int) -> torch.Tensor:
    """The part of one tensor-parallel rank, in memory of its own."""
    if axis is None or size == 1:
        return value.clone()
    if gated:
        return torch.cat([half.chunk(size)[rank] for half in value.chunk(2)])
    return value.chunk(size, dim=axis)[rank].clone()


def unshard(parts: list[torch.Tensor], axis: int | None, gated: bool) -> torch.Tensor:
    """The inverse of :func:`shard`."""
    if axis is None or len(parts) == 1:
        return parts[0]
    if gated:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[side] for side in (0, 1) for half in halves])
    return torch.cat(parts, dim=axis)


def stage_of(name: str, num_layers: int, num_stages: int) -> tuple[int, str]:
    """The pipeline stage of a tensor, layers shared evenly, and its name there.

    A stage counts its layers from its own first. An encoder and its projector live on the first stage.
    """
    match = LAYER.match(name)
    if match and _MAIN_STACK.match(match["stack"]):
        per_stage = num_layers // num_stages
        stage, local = divmod(int(match["number"]), per_stage)
        return stage, f"{match['stack']}{local}.{match['rest']}"
    if _LAST.match(name):
        return num_stages - 1, name
    assert match or _FIRST.match(name), name
    return 0, name


def global_name(name: str, first_layer: int) -> str:
    """The name of a stage's tensor with layers counted from the model's first."""
    match = LAYER.match(name)
    if match and _MAIN_STACK.match(match["stack"]):
        return f"{match['stack']}{int(match['number']) + first_layer}.{match['rest']}"
    return name


def is_main_layer(name: str) -> int | None:
    """The number of the (language model's) decoder layer a tensor belongs to."""
    match = LAYER.match(name)
    return int(match["number"]) if match and _MAIN_STACK.match(match["stack"]) else None


def norm_name(name: str, implementation: str | None) -> str:
    """A norm's name under the "transformer_engine" or "local" layers; None: as it is."""
    for apart, fused in NORM_NAMES:
        if implementation == "local":
            name = name.replace(fused, apart)
        if implementation == "transformer_engine":
            name = name.replace(apart, fused)
    return name
