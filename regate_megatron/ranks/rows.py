"""Microbatches that travel between data-parallel ranks, on the host.

Ranks that hold the same part of a batch (the same tensor, pipeline and context rank of every replica) are *peers*; they
exchange whole microbatches over a gloo group of their own. A microbatch is described in JSON, tensors by dtype and
shape, and followed by their bytes: nothing that arrives is run, as a pickle would be. A dataclass (the pictures of a
Megatron-Bridge batch) is described by its name and attributes, and made of a class that this rank has imported already,
without its constructor.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.errors import refuse
from regate_megatron.ranks.topology import Topology

_ALIGNMENT = 16  # bytes; what a view as any dtype needs
_HEAD = 2  # int64: bytes of all, bytes of the description


class Peers:
    """The ranks of all replicas that hold the same part of a batch as this one. All ranks make this, in step.

    Args:
        has_data: whether this rank pulls batches.

    Raises:
        ReGateError: some ranks of a place pull batches and others do not; on every rank.
    """

    def __init__(self, topology: Topology, has_data: bool) -> None:
        self._group, self._rank, self.has_data = None, topology.dp_rank, has_data
        pulls: list = [None] * dist.get_world_size()
        dist.all_gather_object(pulls, has_data, group=topology.world_group)
        places = [ranks for ranks in topology.places if any(pulls[rank] for rank in ranks)]
        for ranks in places:
            if not all(pulls[rank] for rank in ranks):
                error = refuse(
                    "data iterator",
                    given=f"data on some of the ranks {list(ranks)}, which hold the same part of a batch, not on all",
                    allowed="data on all of them",
                    change="the data loader, or --regate-budget to balanced, which moves no row",
                )
                error.everywhere = True
                raise error
        for ranks in places:
            group = dist.new_group(list(ranks), backend="gloo")
            if dist.get_rank() in ranks:
                self._group = group

    def close(self) -> None:
        """Give the group back; any rank, no communication."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def exchange(self, packed: Sequence[dict[int, Tensor]], from_DM: np.ndarray) -> list[dict[int, Any]]:
        """Give every peer its microbatches; all peers call this, and none fails before it gets here.

        All that is sent is there before any of it is read, so that a rank that cannot read it leaves no peer waiting.

        Args:
            packed: of each data iterator, by its number at home each microbatch that leaves this rank, from
                :func:`pack`.
            from_DM: what each place gets, as rank · M + number at home.

        Returns:
            of each data iterator, by its place here each microbatch that came.

        Raises:
            ValueError: what came is no microbatch.
        """
        return [self._read(came, from_DM) for came in [self._send(one, from_DM) for one in packed]]

    def _send(self, packed: dict[int, Tensor], from_DM: np.ndarray) -> Tensor:
        """The bytes of all microbatches that come, by the rank that sends them."""
        num_ranks, num_micro = from_DM.shape
        parts: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        for to, source in enumerate((from_DM // num_micro == self._rank).tolist()):
            if to != self._rank:
                parts[to] = [packed[int(from_DM[to, at]) % num_micro] for at, is_own in enumerate(source) if is_own]
        send_D = torch.tensor([sum(len(one) for one in part) for part in parts])
        receive_D = torch.empty_like(send_D)
        dist.all_to_all_single(receive_D, send_D, group=self._group)
        came = torch.empty(int(receive_D.sum()), dtype=torch.uint8)
        given = torch.cat([one for part in parts for one in part] or [came[:0]])
        dist.all_to_all_single(came, given, receive_D.tolist(), send_D.tolist(), group=self._group)
        return came

    def _read(self, came: Tensor, from_DM: np.ndarray) -> dict[int, Any]:
        source_M, at = from_DM[self._rank] // from_DM.shape[1], 0
        found = {}
        for place in np.argsort(source_M, kind="stable").tolist():
            if source_M[place] != self._rank:
                found[place], size = unpack(came[at:])
                at += size
        if at != len(came):
            raise ValueError(f"{len(came)} bytes of microbatches that say they have {at}")
        return found


def pack(value: Any) -> Tensor:
    """A microbatch as bytes; uint8 [X], X a multiple of 16.

    Raises:
        ReGateError: it holds what no description is known for.
    """
    buffers: list[Tensor] = []
    text = json.dumps(_describe(value, "batch", buffers)).encode()
    head = torch.tensor([0, len(text)]).view(torch.uint8)
    parts = [
        part for one in (head, torch.frombuffer(bytearray(text), dtype=torch.uint8), *buffers) for part in _whole(one)
    ]
    head[:8] = torch.tensor([sum(len(part) for part in parts)]).view(torch.uint8)
    return torch.cat(parts)


def unpack(given: Tensor) -> tuple[Any, int]:
    """The microbatch that bytes begin with, whose tensors are views into them, and how many bytes it has.

    Raises:
        ValueError: it is none.
    """
    if len(given) < 8 * _HEAD:
        raise ValueError(f"a microbatch of {len(given)} bytes")
    size, text = given[: 8 * _HEAD].view(torch.int64).tolist()
    if not 8 * _HEAD <= 8 * _HEAD + text <= size <= len(given):
        raise ValueError(f"a microbatch of {size} bytes, {text} of them its description, in {len(given)}")
    try:
        described = json.loads(given[8 * _HEAD : 8 * _HEAD + text].numpy().tobytes())
    except ValueError:
        raise ValueError("a microbatch whose description is no JSON") from None
    reader = _Reader(given[:size], 8 * _HEAD + text)
    value = reader.read(described)
    if reader.at != size:
        raise ValueError(f"a microbatch of {size} bytes that describes {reader.at}")
    return value, size


def like_at_home(value: dict[str, Any], home: dict[str, Any]) -> dict[str, Any]:
    """A microbatch that came, its tensors where those of this rank lie: on their device, pinned if they are."""

    def place(one: Any, own: Any) -> Any:
        if type(one) is type(own) and dataclasses.is_dataclass(one):
            for name, part in _attributes(one).items():
                object.__setattr__(one, name, place(part, getattr(own, name, None)))
        if not (torch.is_tensor(one) and torch.is_tensor(own)):
            return one
        return one.pin_memory() if own.is_pinned() else one.to(own.device)

    return {key: place(one, home.get(key)) for key, one in value.items()}


def _describe(value: Any, where: str, buffers: list[Tensor]) -> list:
    if value is None or type(value) in (bool, int, float, str):
        return ["value", value]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_describe(one, f"{where}[{at}]", buffers) for at, one in enumerate(value)]]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["dict", [[key, _describe(one, f"{where}[{key!r}]", buffers)] for key, one in value.items()]]
    if dataclasses.is_dataclass(value) and _dataclass(*_name_of(value)) is type(value):
        parts = _attributes(value).items()
        return ["object", *_name_of(value), [[key, _describe(one, f"{where}.{key}", buffers)] for key, one in parts]]
    kind = "tensor"
    if isinstance(value, bytes):
        kind, value = "bytes", torch.frombuffer(bytearray(value) or bytearray(1), dtype=torch.uint8)[: len(value)]
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        kind, value = "array", torch.from_numpy(np.array(value))
    if not torch.is_tensor(value) or value.layout is not torch.strided:
        raise refuse(
            f"{where} under --regate-budget dealt",
            given=f"{type(value).__module__}.{type(value).__qualname__}",
            allowed="tensors, numbers, text, None, and lists, dictionaries and dataclasses of them",
            change="the data loader, or --regate-budget to balanced, which moves no row",
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    buffers.append(flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8))
    return [kind, str(value.dtype).removeprefix("torch."), list(value.shape)]


def _name_of(value: Any) -> tuple[str, str]:
    return type(value).__module__, type(value).__qualname__


def _attributes(value: Any) -> dict[str, Any]:
    """All that a dataclass holds, fields or not."""
    return (
        dict(vars(value))
        if hasattr(value, "__dict__")
        else {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    )


def _dataclass(module: str, name: str) -> type | None:
    """The class of this name in a module that is imported already; None where there is none. Nothing is run."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def _whole(part: Tensor) -> Sequence[Tensor]:
    """A part, and what fills it up to the alignment."""
    return part, part.new_zeros(-len(part) % _ALIGNMENT)


def _are_pairs(parts: list) -> bool:
    return all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in parts)


class _Reader:
    """Takes values out of bytes by their description, checking both."""

    def __init__(self, given: Tensor, at: int) -> None:
        self._given, self.at = given, at + -at % _ALIGNMENT

    def read(self, described: Any) -> Any:
        match described:
            case ["value", None | bool() | int() | float() | str() as value]:
                return value
            case ["list" | "tuple" as kind, list() as parts]:
                return {"list": list, "tuple": tuple}[kind](self.read(one) for one in parts)
            case ["dict", list() as parts] if _are_pairs(parts):
                return {key: self.read(one) for key, one in parts}
            case ["object", str() as module, str() as name, list() as parts] if _are_pairs(parts):
                kind = _dataclass(module, name)
                if kind is None:
                    raise ValueError(f"a microbatch with a {module[:80]}.{name[:80]}, which is no dataclass here")
                value = object.__new__(kind)
                for key, one in parts:
                    object.__setattr__(value, key, self.read(one))
                return value
            case ["tensor" | "array" | "bytes" as kind, str() as dtype, list() as shape]:
                tensor = self._take(dtype, shape)
                return tensor if kind == "tensor" else tensor.numpy() if kind == "array" else tensor.numpy().tobytes()
        raise ValueError(f"a microbatch with {str(described)[:80]} in its description")

    def _take(self, dtype: str, shape: list) -> Tensor:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a microbatch with a tensor of {dtype[:40]} {str(shape)[:80]}")
        size = kind.itemsize
        for one in shape:
            size *= one
        part = self._given[self.at : self.at + size]
        if len(part) != size:
            raise ValueError(f"a microbatch with a tensor of {size} bytes where {len(part)} are left")
        self.at += size + -size % _ALIGNMENT
        return part.view(kind).view(shape) if size else torch.empty(shape, dtype=kind)
