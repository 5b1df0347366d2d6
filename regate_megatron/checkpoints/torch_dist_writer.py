"""Writing Megatron's torch_dist format without Megatron and without process groups: pieces of tensors, read lazily.

See :mod:`regate_megatron.checkpoints.torch_dist` for the format.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from regate_megatron.checkpoints.targets import TRACKER
from regate_megatron.checkpoints.torch_dist import COMMON_FILE

RELEASE = "release"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor to be written.

    Attributes:
        name: the tensor.
        size: shape of the whole tensor.
        offsets: where the part begins.
        shape: shape of the part.
        dtype: type of the elements.
        read: gives the part, or its elements in another shape.
    """

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# Modules of which a Transformer Engine model asks the checkpoint for an (empty) extra state.
_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "final_layernorm", "q_layernorm", "k_layernorm")
_WITH_STATE += ("ln_pre",)


def extra_states(pieces: list[Piece]) -> dict[str, list[None]]:
    """The empty extra states, by name, of the modules that the pieces belong to."""
    objects: dict[str, list[None]] = {}
    for piece in pieces:
        module = piece.name.rsplit(".", 1)[0]
        stacked = ".layers." in module
        shard = f"_extra_state/shard_{piece.offsets[0] if stacked else 0}_{piece.size[0] if stacked else 1}"
        if module.endswith(_WITH_STATE):
            objects[f"{module}.{shard}"] = [None]
        if module.endswith(".linear_qkv"):
            objects[f"{module.removesuffix('linear_qkv')}core_attention.{shard}"] = [None]
    return objects


class _LazyPlanner(DefaultSavePlanner):
    """Asks for a piece when it is written, and forgets it then."""

    def __init__(self, pieces: list[Piece], objects: dict[str, Any], progress: Callable[[int], Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(piece.name, torch.Size(piece.offsets)): piece for piece in pieces}
        self.objects, self.progress = objects, progress

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.size),
                ),
            )
            for index, piece in self.pieces.items()
        ]
        items += [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0))
            for name in self.objects
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self.objects[write_item.index.fqn], buffer)
            return buffer
        piece = self.pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        value = piece.read()
        assert value.dtype == piece.dtype, (piece.name, value.dtype)
        self.progress(piece.num_bytes)
        return value.reshape(piece.shape)


def write_torch_dist(
    folder: Path,
    pieces: list[Piece],
    *,
    objects: dict[str, Any],
    common: dict[str, Any],
    progress: Callable[[int], Any],
) -> None:
    """Write a checkpoint folder: one iteration called "release", and the tracker file that names it.

    Loaders start a release at iteration 0 and ask for neither optimizer nor random state.

    Args:
        folder: an empty folder.
        objects: small things stored by name beside the tensors.
        common: what Megatron's loader calls the common state: "args", "iteration", "checkpoint_version".
        progress: called with the number of bytes written since its last call.
    """
    iteration = folder / RELEASE
    iteration.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist says
        try:
            checkpoint.save(
                {},
                storage_writer=FileSystemWriter(str(iteration)),
                planner=_LazyPlanner(pieces, objects, progress),
                no_dist=True,
            )
        except CheckpointException as error:  # a wrapper: what counts is what a read or a write raised
            raise next(iter(error.failures.values()))[0] from error
    torch.save(common, iteration / COMMON_FILE)
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / TRACKER).write_text(RELEASE)
