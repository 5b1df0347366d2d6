"""A fingerprint of a language model's weights that does not depend on how they are sharded or saved.

    h = sum over tensors, rows r, columns c of  K(name) · A(r) · B(c) · bits(r, c)   mod 2^64, twice

K, A and B are odd 64-bit numbers made from the tensor's name and the global row and column, so every rank adds up the
elements it happens to have, cut in any way and in any order, and the sums are added over ranks. Names are the canonical
ones (no prefix, norms stored apart or fused alike). It is a check against mistakes, not against forgery.

It reads every weight once. That is affordable because the work is spread over all ranks: a 70B teacher is 140 GB, on 64
ranks 2.2 GB each, seconds (0.7 GB/s on one core of an AMD EPYC). The result for a checkpoint is kept in the cache
directory and reused for as long as names, sizes and times of the checkpoint's files stay as they are.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from regate_megatron.compat import base_name, is_adapter
from regate_megatron.errors import refuse
from regate_megatron.ranks.publishing import write_aside
from regate_megatron.ranks.topology import Topology
from regate_megatron.teacher.weights import LanguageModelCheckpoint, canonical_name

NOTES = "fingerprints"
_LANES = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_IN_CACHE, _BLOCK_ON_DEVICE = 1 << 16, 1 << 22  # elements widened to int64 at a time
_ROOTS = ("embedding", "decoder", "output_layer")

# Name, global shape, offset, and values of a part of a tensor.
_Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def fingerprint_of_model(chunks: Sequence[Any], topology: Topology) -> str:
    """The fingerprint of a sharded language model in memory; all ranks call this, over the world's gloo group."""
    return _add_up((piece for chunk in chunks for piece in _pieces_of_model(chunk)), topology)


def fingerprint_of_checkpoint(checkpoint: LanguageModelCheckpoint, cache: Path, topology: Topology) -> str:
    """The fingerprint of a language model on disk; all ranks call this, over the world's gloo group.

    Args:
        cache: the cache's folder, where the result is kept for the next run.

    Raises:
        ReGateError: a data file is damaged or missing; on every rank.
    """
    known: list = [None]
    with topology.together("checkpoint", allowed="a complete checkpoint", change="to one saved or copied in full"):
        note = _note_of(checkpoint, cache)
        if dist.get_rank() == 0:
            known = [_read_note(note)]
    dist.broadcast_object_list(known, src=0, group=topology.world_group)
    if known[0] is None:
        known = [_add_up(_pieces_of_checkpoint(checkpoint), topology, str(checkpoint.path))]
        form = {"allowed": "a folder that can be written", "change": f"the permissions of {note.parent}"}
        with topology.together("reference cache", **form):
            if dist.get_rank() == 0:
                note.parent.mkdir(parents=True, exist_ok=True)
                write_aside(note, json.dumps({"checkpoint": str(checkpoint.path), "weights": known[0]}).encode())
    return known[0]


def _add_up(pieces: Iterable[_Piece], topology: Topology, source: str = "the model") -> str:
    """Sum of all ranks' pieces, with the names, shapes and types of all tensors; 32 hexadecimal digits."""
    sums, tensors = [0, 0], {}
    with topology.together("checkpoint"):
        try:
            for name, shape, offset, values in pieces:
                tensors[name] = [list(shape), str(values.dtype).removeprefix("torch.")]
                for lane, part in enumerate(sums_of(name, shape, offset, values)):
                    sums[lane] += part
        except Exception as fault:  # damaged files raise whatever they like
            raise refuse(
                "checkpoint",
                given=f"{source}, whose data cannot be read ({type(fault).__name__})",
                allowed="a complete checkpoint",
                change="to one saved or copied in full",
            ) from fault
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (sums, tensors), group=topology.world_group)
    tensors = {name: found for _, part in parts for name, found in part.items()}
    totals = [sum(part[lane] for part, _ in parts) % 2**64 for lane in range(len(_LANES))]
    return xxhash.xxh3_128_hexdigest(json.dumps([totals, sorted(tensors.items())]).encode())


@torch.no_grad()
def sums_of(name: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> list[int]:
    """A piece's part of both sums, mod 2^64.

    Args:
        name, shape: of the whole tensor.
        offset: where in it the piece starts.
    """
    bits_RC = values.contiguous().view(_BITS[values.element_size()]).reshape(-1, values.shape[-1])
    axes = [np.arange(start, start + size) for start, size in zip(offset[:-1], values.shape[:-1], strict=True)]
    row_R = np.zeros(1, np.int64)
    if axes:
        row_R = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), shape[:-1]).reshape(-1)
    column_C = np.arange(offset[-1], offset[-1] + values.shape[-1])
    a_LR = [_odd(row_R, salt).to(values.device) for salt in _LANES]
    b_LC = [_odd(column_C, salt ^ 0x5851F42D4C957F2D).to(values.device) for salt in _LANES]
    block = _BLOCK_IN_CACHE if values.device.type == "cpu" else _BLOCK_ON_DEVICE
    step, totals = max(1, block // len(column_C)), [0] * len(_LANES)
    for start in range(0, len(bits_RC), step):
        block_RC = bits_RC[start : start + step].long()
        for lane, (a_R, b_C) in enumerate(zip(a_LR, b_LC, strict=True)):
            totals[lane] += int(
                ((block_RC * b_C).sum(dim=1) * a_R[start : start + step]).sum()
            )  # int64 wraps, as meant
    factors = [xxhash.xxh3_64_intdigest(name.encode(), seed=salt & 0xFFFFFFFF) | 1 for salt in _LANES]
    return [total * factor % 2**64 for total, factor in zip(totals, factors, strict=True)]


def _odd(index: np.ndarray, salt: int) -> Tensor:
    """An odd 64-bit number per index (splitmix64), int64."""
    x = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64))


def _pieces_of_model(model: Any) -> Iterator[_Piece]:
    """What this rank holds as the first of its replicas."""
    for value in sharded_tensors(model):
        replica = value.replica_id if isinstance(value.replica_id, tuple) else (value.replica_id,)
        if value.data is not None and not any(replica):
            data = value.data.detach()
            data = data.reshape((1,) * value.prepend_axis_num + tuple(data.shape))
            yield canonical_name(value.key), tuple(value.global_shape), tuple(value.global_offset), data


def sharded_tensors(model: Any) -> Iterator[Any]:
    """The tensors of a language-model chunk as a checkpoint of its base has them: Megatron's ``ShardedTensor``."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    for value in _leaves(state):
        if isinstance(value, ShardedTensor) and value.key.split(".")[0] in _ROOTS and not is_adapter(value.key):
            value.key = base_name(value.key)
            yield value


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)
    else:
        yield state


def _pieces_of_checkpoint(checkpoint: LanguageModelCheckpoint) -> Iterator[_Piece]:
    """This rank's share of the pieces on disk, about the same number of bytes on each rank."""
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(str(checkpoint.path)).read_metadata()
    names = {checkpoint.prefix + own: own for own in checkpoint.shapes}
    places = [place for place in index.storage_data if place.fqn in names]
    places.sort(key=lambda place: (-index.storage_data[place].length, place.fqn, tuple(place.offset or ())))
    for place in places[dist.get_rank() :: dist.get_world_size()]:
        info, own = index.storage_data[place], names[place.fqn]
        with (checkpoint.path / Path(info.relative_path).name).open("rb") as file:
            file.seek(info.offset)
            values = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
        shape = checkpoint.shapes[own]
        assert math.prod(values.shape) <= math.prod(shape), place
        yield canonical_name(own), shape, tuple(place.offset or (0,) * len(shape)), values


def _note_of(checkpoint: LanguageModelCheckpoint, cache: Path) -> Path:
    """Where the result for this checkpoint is kept: a name made of its files' names, sizes and times."""
    path = checkpoint.path.resolve()
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in path.iterdir())
    state = json.dumps([str(path), checkpoint.prefix, files])
    return cache / NOTES / f"{xxhash.xxh3_128_hexdigest(state.encode())}.json"


def _read_note(note: Path) -> str | None:
    try:
        return str(json.loads(note.read_text())["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
