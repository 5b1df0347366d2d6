"""Megatron's torch_dist format without Megatron and without process groups: pieces of tensors, read and written lazily.

A torch_dist checkpoint is one of torch.distributed.checkpoint, with Megatron's common state in ``common.pt`` (all
versions of megatron-core read it; since 0.19 they save it inside) and a ``metadata.json``. Layers of one kind are
stacked in one tensor, [L, ...].
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.teacher.weights import TRACKER, find_iteration

COMMON_FILE = "common.pt"
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


class _OnePlanner(DefaultLoadPlanner):
    """Reads one piece of a tensor into ``into``, or an object, still pickled, into ``content``."""

    def __init__(self, into: torch.Tensor | None = None) -> None:
        super().__init__()
        self.into, self.content = into, b""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        value = self.into
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            value = value.narrow(axis, start, length)
        return value

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it was copied in place

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()


class TorchDistReader:
    """The tensors of one torch_dist checkpoint, by name and piece; the index is checked before it is unpickled.

    Args:
        folder: a checkpoint folder, or that of one iteration.

    Raises:
        ReGateError: see ``teacher.weights.find_iteration``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = find_iteration(folder, "--source")
        self._reader = FileSystemReader(str(self.path))
        self.metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, True)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor; stacked layers count as one."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: tuple(entry.size) for name, entry in entries if hasattr(entry, "size")}

    @property
    def objects(self) -> list[str]:
        """Names of what is stored beside tensors."""
        return [name for name, entry in self.metadata.state_dict_metadata.items() if not hasattr(entry, "size")]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.metadata.state_dict_metadata[name].properties.dtype

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """A tensor, or one layer of a stacked one; only the files' parts that overlap it are read.

        Raises:
            ReGateError: a data file is damaged or missing.
        """
        size = self.metadata.state_dict_metadata[name].size
        start, shape = [0] * len(size), list(size)
        if layer is not None:
            start[0], shape[0] = layer, 1
        into = self._read_box(name, start, shape)
        return into if layer is None else into[0]

    def pieces(self, name: str, new_name: str) -> list[Piece]:
        """A tensor in the pieces it is stored in, to be written under another name.

        Raises:
            ReGateError: on reading a piece, as :meth:`read`.
        """
        entry = self.metadata.state_dict_metadata[name]
        return [
            Piece(
                name=new_name,
                size=tuple(entry.size),
                offsets=tuple(chunk.offsets),
                shape=tuple(chunk.sizes),
                dtype=entry.properties.dtype,
                read=partial(self._read_box, name, chunk.offsets, chunk.sizes),
            )
            for chunk in entry.chunks
        ]

    def read_object(self, name: str) -> bytes:
        """What is stored beside tensors under a name: a pickle, left as it is.

        Raises:
            ReGateError: a data file is damaged or missing.
        """
        index, none = MetadataIndex(name), torch.Size([])
        item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
        return self._load(name, [item], _OnePlanner()).content

    def _read_box(self, name: str, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """What of a tensor lies in a box."""
        entry = self.metadata.state_dict_metadata[name]
        into = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        items = [item for chunk in entry.chunks if (item := _overlap(name, chunk, start, shape)) is not None]
        if sum(item.lengths.numel() for item in items) != into.numel():
            raise self._unreadable(name, "parts are missing")
        self._load(name, items, _OnePlanner(into))
        return into

    def _load(self, name: str, items: list[ReadItem], planner: _OnePlanner) -> _OnePlanner:
        try:
            plan = self._reader.prepare_local_plan(LoadPlan(items))
            self._reader.read_data(plan, planner).wait()
        except (Exception, CheckpointException) as error:  # damaged files raise anything
            raise self._unreadable(name, type(error).__name__) from error
        return planner

    def common_state(self) -> dict[str, Any]:
        """Megatron's common state, read weights-only; empty where there is none, or one with classes not allowed.

        Raises:
            ReGateError: its file is damaged.
        """
        try:
            with _namespace_allowed():
                found = torch.load(self.path / COMMON_FILE, weights_only=True)  # as written here: plain values
        except Exception as error:  # damaged pickles raise whatever they like
            # Since megatron-core 0.19 it lies inside the checkpoint; and where weights-only unpickling ended at a
            # global, a class that is not allowed, Megatron knows which ones may be.
            if not (isinstance(error, FileNotFoundError) or "global" in str(error).lower()):
                raise self._unreadable(COMMON_FILE, type(error).__name__) from error
            found = self._common_state_by_megatron()
        return found if isinstance(found, dict) else {}

    def _common_state_by_megatron(self) -> Any:
        from megatron.core import dist_checkpointing

        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # of deprecation and of a missing process group, which say nothing to a user
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return dist_checkpointing.load_common_state_dict(str(self.path))
        except (Exception, CheckpointException):  # absent, or of a class that is not allowed: the caller does without
            return None
        finally:
            logging.disable(before)

    def _unreadable(self, name: str, reason: str) -> ReGateError:
        return refuse(
            "--source",
            given=f"{self.path}, whose {name} cannot be read ({reason})",
            allowed="a complete checkpoint",
            change="to one saved or copied in full",
        )

    def arguments(self) -> Namespace:
        """Megatron's saved arguments; empty where there are none."""
        found = self.common_state().get("args")
        return found if isinstance(found, Namespace) else Namespace()


@contextmanager
def _namespace_allowed() -> Iterator[None]:
    """Allow argparse's namespace inside the block, and leave torch's list of safe classes as it was.

    ``torch.serialization.safe_globals`` alone would at its end forbid what had been allowed before it, by Megatron say.
    """
    is_allowed = Namespace in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([] if is_allowed else [Namespace]):
        yield


def _overlap(name: str, chunk: Any, start: Sequence[int], shape: Sequence[int]) -> ReadItem | None:
    """What of a stored chunk falls into the wanted box."""
    stored, wanted, lengths = [], [], []
    for begin, size, offset, length in zip(chunk.offsets, chunk.sizes, start, shape, strict=True):
        low, high = max(begin, offset), min(begin + size, offset + length)
        if low >= high:
            return None
        stored.append(low - begin)
        wanted.append(low - offset)
        lengths.append(high - low)
    index = MetadataIndex(name, chunk.offsets)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size(wanted),
        storage_index=index,
        storage_offsets=torch.Size(stored),
        lengths=torch.Size(lengths),
    )


# Modules of which a Transformer Engine model asks the checkpoint for an (empty) extra state.
_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "final_layernorm", "q_layernorm", "k_layernorm")
_WITH_STATE += ("ln_pre",)


def extra_states(pieces: list[Piece]) -> dict[str, bytes]:
    """The empty extra states, pickled, by name, of the modules that the pieces belong to."""
    objects: dict[str, bytes] = {}
    buffer = io.BytesIO()
    torch.save([None], buffer)
    empty = buffer.getvalue()
    for piece in pieces:
        module = piece.name.rsplit(".", 1)[0]
        stacked = ".layers." in module
        shard = f"_extra_state/shard_{piece.offsets[0] if stacked else 0}_{piece.size[0] if stacked else 1}"
        if module.endswith(_WITH_STATE):
            objects[f"{module}.{shard}"] = empty
        if module.endswith(".linear_qkv"):
            objects[f"{module.removesuffix('linear_qkv')}core_attention.{shard}"] = empty
    return objects


class _LazyPlanner(DefaultSavePlanner):
    """Asks for a piece when it is written, and forgets it then."""

    def __init__(self, pieces: list[Piece], objects: dict[str, bytes], progress: Callable[[int], Any]) -> None:
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
            return io.BytesIO(self.objects[write_item.index.fqn])
        piece = self.pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        value = piece.read()
        assert value.dtype == piece.dtype, (piece.name, value.dtype)
        self.progress(piece.num_bytes)
        return value.reshape(piece.shape)


def write_torch_dist(
    folder: Path,
    pieces: list[Piece],
    *,
    objects: dict[str, bytes],
    common: dict[str, Any] | None,
    progress: Callable[[int], Any],
) -> None:
    """Write a checkpoint folder: one iteration called "release", and the tracker file that names it.

    Loaders start a release at iteration 0 and ask for neither optimizer nor random state.

    Args:
        folder: an empty folder.
        objects: small things stored by name beside the tensors, pickled.
        common: what Megatron's loader calls the common state ("args", "iteration", "checkpoint_version"); None where
            it is among the objects or the caller brings its file.
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
    if common is not None:
        torch.save(common, iteration / COMMON_FILE)
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / TRACKER).write_text(RELEASE)
