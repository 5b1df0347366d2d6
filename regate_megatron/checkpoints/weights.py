"""All weights of a Megatron checkpoint under one naming, whatever its format: whole tensors, layers by number."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from regate_megatron.checkpoints.legacy import find_legacy, read_ranks
from regate_megatron.checkpoints.tensor_slices import LAYER, global_name, is_gated, is_main_layer, split_axis, unshard
from regate_megatron.checkpoints.torch_dist import TorchDistReader
from regate_megatron.errors import refuse
from regate_megatron.teacher.checkpoint import EMBEDDING

_ROOTS = ("embedding.", "decoder.", "output_layer.", "language_model.", "vision_model.", "vision_projection.")
_STACK = re.compile(r"(.*\blayers\.)(\D.*)")


@dataclass(frozen=True)
class Weight:
    """One tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        read: gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class MegatronWeights:
    """A checkpoint.

    Attributes:
        path: folder of the iteration.
        format: "torch_dist" or "torch".
        layout: its (tensor, pipeline) sizes; None where the format does not depend on them.
        weights: by name, layers counted over the whole model.
        arguments: Megatron's saved arguments.
    """

    path: Path
    format: str
    layout: tuple[int, int] | None
    weights: dict[str, Weight]
    arguments: Namespace

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.num_bytes for weight in self.weights.values())

    @property
    def num_layers(self) -> int:
        """Layers of the (language model's) decoder."""
        return 1 + max((n for name in self.weights if (n := is_main_layer(name)) is not None), default=-1)

    def gated(self, name: str) -> bool:
        """Whether a tensor is a gate and its values, one after the other."""
        return is_gated(name, {name: weight.shape for name, weight in self.weights.items()})


def open_weights(folder: str | Path, what: str = "--source") -> MegatronWeights:
    """Open a checkpoint in either format; of torch_dist only the index is read.

    Raises:
        ReGateError: no checkpoint, a damaged one, or tensors whose layout is not known.
    """
    legacy = find_legacy(folder) if Path(folder).is_dir() else None
    found = _from_legacy(legacy, what) if legacy else _from_torch_dist(folder, what)
    if not found.num_layers:
        raise refuse(
            what, given=f"{found.path}, which holds no decoder", allowed="a GPTModel or LLaVAModel", change="the path"
        )
    if not any(name.endswith(EMBEDDING) for name in found.weights):
        raise refuse(
            what, given=f"{found.path}, which holds no {EMBEDDING}", allowed="a whole model", change="the path"
        )
    for name in found.weights:
        split_axis(name, what)
    return found


def _from_torch_dist(folder: str | Path, what: str) -> MegatronWeights:
    reader = TorchDistReader(folder, what)
    weights: dict[str, Weight] = {}
    for name, shape in reader.shapes.items():
        if not name.startswith(_ROOTS):
            continue  # optimizer, random state, ours
        stack = _STACK.match(name)
        if stack and not LAYER.match(name):
            for layer in range(shape[0]):
                weights[f"{stack[1]}{layer}.{stack[2]}"] = Weight(
                    shape[1:], reader.dtype(name), lambda name=name, layer=layer: reader.read(name, layer)
                )
        else:
            weights[name] = Weight(shape, reader.dtype(name), lambda name=name: reader.read(name))
    return MegatronWeights(reader.path, "torch_dist", None, weights, reader.arguments())


def _from_legacy(path: Path, what: str) -> MegatronWeights:
    ranks = read_ranks(path, what)
    sizes = max(tensor for tensor, _ in ranks) + 1, max(stage for _, stage in ranks) + 1
    weights: dict[str, Weight] = {}
    first_layer = 0
    for stage in range(sizes[1]):
        models = [_tensors(ranks[rank, stage]["model"]) for rank in range(sizes[0])]
        if any(model.keys() != models[0].keys() for model in models):
            raise refuse(
                what,
                given=f"{path}, whose tensor-parallel ranks of stage {stage} hold different tensors",
                allowed="a complete checkpoint",
                change="it",
            )
        shapes = {name: tuple(value.shape) for name, value in models[0].items()}
        for name in models[0]:
            if name.endswith("output_layer.weight") and stage and _is_tied(ranks[0, stage]):
                continue  # the last stage's copy of the tied embedding
            parts = [model[name] for model in models]
            if len({part.shape for part in parts}) > 1 or parts[0].dim() <= (split_axis(name, what) or 0):
                shapes_of = ", ".join(str(tuple(part.shape)) for part in parts)
                raise refuse(
                    what, given=f"{path}, whose {name} has the shapes {shapes_of}", allowed="equal parts", change="it"
                )
            weights[global_name(name, first_layer)] = _joined(parts, split_axis(name, what), is_gated(name, shapes))
        first_layer += 1 + max((n for name in models[0] if (n := is_main_layer(name)) is not None), default=-1)
    return MegatronWeights(path, "torch", sizes, weights, ranks[0, 0].get("args") or Namespace())


def _tensors(model: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.items() if torch.is_tensor(value) and "_extra_state" not in name}


def _is_tied(state: dict) -> bool:
    return not getattr(state.get("args"), "untie_embeddings_and_output_weights", True)


def _joined(parts: list[torch.Tensor], axis: int | None, gated: bool) -> Weight:
    shape = list(parts[0].shape)
    if axis is not None:
        shape[axis] *= len(parts)
    return Weight(tuple(shape), parts[0].dtype, lambda: unshard(parts, axis, gated))
