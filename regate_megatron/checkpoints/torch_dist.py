"""Reading Megatron's torch_dist format without Megatron and without process groups: pieces of tensors, read lazily.

A torch_dist checkpoint is one of torch.distributed.checkpoint, with Megatron's common state in ``common.pt`` (all
versions of megatron-core read it; since 0.19 they save it inside) and a ``metadata.json``. Layers of one kind are
stacked in one tensor, [L, ...].
"""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
)

from regate_megatron.checkpoints.trust import allowed_classes, is_distrust
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.teacher.checkpoint import find_iteration

COMMON_FILE = "common.pt"


class _PiecePlanner(DefaultLoadPlanner):
    """Reads one piece into one tensor."""

    def __init__(self, into: torch.Tensor) -> None:
        super().__init__()
        self.into = into

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        value = self.into
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            value = value.narrow(axis, start, length)
        return value

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # it was copied in place


class TorchDistReader:
    """The tensors of one torch_dist checkpoint, by name and piece; the index is checked before it is unpickled.

    Args:
        folder: a checkpoint folder, or that of one iteration.
        what: the option to name in a refusal.

    Raises:
        ReGateError: see ``checkpoint.find_iteration``.
    """

    def __init__(self, folder: str | Path, what: str = "--source") -> None:
        self.path, self.what = find_iteration(folder, what), what
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
        entry = self.metadata.state_dict_metadata[name]
        start = [0] * len(entry.size)
        shape = list(entry.size)
        if layer is not None:
            start[0], shape[0] = layer, 1
        into = torch.empty(shape, dtype=entry.properties.dtype)
        items = [item for chunk in entry.chunks if (item := _overlap(name, chunk, start, shape)) is not None]
        try:
            if sum(item.lengths.numel() for item in items) != into.numel():
                raise ValueError("parts are missing")
            plan = self._reader.prepare_local_plan(LoadPlan(items))
            self._reader.read_data(plan, _PiecePlanner(into)).wait()
        except (Exception, CheckpointException) as error:  # damaged files raise anything
            raise self._unreadable(name, error) from error
        return into if layer is None else into[0]

    def common_state(self) -> dict[str, Any]:
        """Megatron's common state, read weights-only; empty where there is none, or one with classes not allowed.

        Raises:
            ReGateError: its file is damaged.
        """
        try:
            with allowed_classes([Namespace]):
                found = torch.load(self.path / COMMON_FILE, weights_only=True)  # as written here: plain values
        except Exception as error:  # damaged pickles raise whatever they like
            # Since megatron-core 0.19 it lies inside the checkpoint; and Megatron knows which classes it may have.
            if not (isinstance(error, FileNotFoundError) or is_distrust(error)):
                raise self._unreadable(COMMON_FILE, error) from error
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

    def _unreadable(self, name: str, error: BaseException) -> ReGateError:
        return refuse(
            self.what,
            given=f"{self.path}, whose {name} cannot be read ({type(error).__name__})",
            allowed="a complete checkpoint",
            change="to one saved or copied in full",
        )

    def arguments(self) -> Namespace:
        """Megatron's saved arguments; empty where there are none."""
        found = self.common_state().get("args")
        return found if isinstance(found, Namespace) else Namespace()


def _overlap(name: str, chunk: Any, start: list[int], shape: list[int]) -> ReadItem | None:
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
