"""Another tensor- and pipeline-parallel layout: from torch_dist to legacy folders, back, and between legacy layouts.

Weights and arguments only: optimizer and random states stay behind, and loaders start the result at iteration 0.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.legacy import rank_folder, write_rank
from regate_megatron.checkpoints.targets import TRACKER, check_target, new_folder
from regate_megatron.checkpoints.tensor_slices import LAYER, norm_name, shard, split_axis, stage_of
from regate_megatron.checkpoints.torch_dist_writer import RELEASE, Piece, extra_states, write_torch_dist
from regate_megatron.checkpoints.weights import MegatronWeights
from regate_megatron.errors import refuse


@dataclass(frozen=True)
class Reshard:
    """A planned change.

    Attributes:
        source: the checkpoint.
        format: of the target, "torch" or "torch_dist".
        layout: (tensor, pipeline) sizes of a target in the legacy format.
        implementation: whose names the norms get; None: as they are.
    """

    source: MegatronWeights
    format: str
    layout: tuple[int, int]
    implementation: str | None

    @property
    def arguments(self) -> Namespace:
        """The source's arguments, with the new layout."""
        arguments = copy.copy(self.source.arguments)
        arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size = self.layout
        arguments.virtual_pipeline_model_parallel_size = None
        arguments.ckpt_format = self.format
        return arguments


def plan_reshard(
    source: MegatronWeights, *, format: str, layout: tuple[int, int], implementation: str | None = None
) -> Reshard:
    """Check that the layout fits the model.

    Raises:
        ReGateError: nothing would change, or sizes do not divide.
    """
    tensor_size, num_stages = layout
    if format == source.format == "torch_dist":
        raise refuse(
            "--format",
            given="torch_dist for a checkpoint in torch_dist",
            allowed="torch: torch_dist loads at any layout as it is",
            change="it, or use the checkpoint as it is",
        )
    if source.num_layers % num_stages:
        raise refuse(
            "--pipeline-model-parallel-size",
            given=f"{num_stages} for {source.num_layers} layers",
            allowed="a divisor of the layers",
            change="it",
        )
    for name, weight in source.weights.items():
        axis = split_axis(name)
        halves = 2 if source.gated(name) else 1
        if axis is not None and weight.shape[axis] % (tensor_size * halves):
            raise refuse(
                "--tensor-model-parallel-size",
                given=f"{tensor_size} for {name} of shape {weight.shape}",
                allowed="a divisor of it",
                change="it" + (", or pad the vocabulary when the model is saved" if weight.shape[axis] % 2 else ""),
            )
    return Reshard(source, format, layout, implementation)


def check_reshard(plan: Reshard, target: str | Path, *, overwrite: bool) -> None:
    """Refuse a target that :func:`reshard` would refuse."""
    check_target(target, sources=(plan.source.path,), overwrite=overwrite, num_bytes=plan.source.num_bytes)


def reshard(
    plan: Reshard, target: str | Path, *, overwrite: bool = False, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write the checkpoint; nothing is left at ``target`` after an error.

    Raises:
        ReGateError: the target cannot be written, or the source is damaged.
    """
    sources, num_bytes = (plan.source.path,), plan.source.num_bytes
    with new_folder(target, sources=sources, overwrite=overwrite, num_bytes=num_bytes) as aside:
        if plan.format == "torch_dist":
            _write_torch_dist(plan, aside, progress)
        else:
            _write_legacy(plan, aside, progress)


def _write_legacy(plan: Reshard, folder: Path, progress: Callable[[int], Any]) -> None:
    tensor_size, num_stages = plan.layout
    source = plan.source
    stages: list[list[tuple[str, str]]] = [[] for _ in range(num_stages)]  # (name, name on the stage)
    for name in source.weights:
        stage, local = stage_of(name, source.num_layers, num_stages)
        stages[stage].append((name, norm_name(local, plan.implementation)))
    outputs = [name for name in source.weights if name.endswith("output_layer.weight")]
    if num_stages > 1 and not outputs:  # tied: the last stage has a copy of the embedding
        words = next(name for name in source.weights if name.endswith("word_embeddings.weight"))
        stages[-1].append((words, words.replace("embedding.word_embeddings", "output_layer")))
    for stage, names in enumerate(stages):
        for rank in range(tensor_size):
            weights: dict[str, torch.Tensor] = {}
            for name, local in names:
                axis, gated = split_axis(name), source.gated(name)
                weights[local] = shard(source.weights[name].read(), axis, gated, rank, tensor_size)
                progress(source.weights[name].num_bytes // tensor_size)
            write_rank(folder / RELEASE / rank_folder(rank, stage, num_stages), weights, plan.arguments)
    (folder / TRACKER).write_text(RELEASE)


def _write_torch_dist(plan: Reshard, folder: Path, progress: Callable[[int], Any]) -> None:
    stacks: dict[str, int] = {}
    for name in plan.source.weights:
        if match := LAYER.match(name):
            stacks[match["stack"]] = max(stacks.get(match["stack"], 0), int(match["number"]) + 1)
    pieces = []
    for name, weight in plan.source.weights.items():
        match = LAYER.match(name)
        new = norm_name(name, plan.implementation)
        if match:
            count, number = stacks[match["stack"]], int(match["number"])
            stored = match["stack"] + LAYER.match(new)["rest"]
            size, offsets = (count, *weight.shape), (number, *(0 for _ in weight.shape))
            pieces.append(Piece(stored, size, offsets, (1, *weight.shape), weight.dtype, weight.read))
        else:
            pieces.append(Piece(new, weight.shape, (0,) * len(weight.shape), weight.shape, weight.dtype, weight.read))
    common = {"args": plan.arguments, "checkpoint_version": 3.0, "iteration": 0}
    write_torch_dist(folder, pieces, objects=extra_states(pieces), common=common, progress=progress)
