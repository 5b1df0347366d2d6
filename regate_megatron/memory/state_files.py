"""How what was learned lies on disk: a folder with one file per planner, the prior, and a manifest over all.

- ``difficulty-00003.npy``: two numpy arrays one after the other, as ``numpy.save`` writes them: an entry per sample
  (key, number of targets, last step seen; 24 bytes) and the float16 values of all samples in that order.
- ``prior.npy``: the mean loss per token id, float64, NaN where never seen.
- ``state.json``: the manifest: step, settings, and of every file its size and xxh3 checksum; with a checksum of itself.

Nothing is pickled. A file is checked while it is read; whoever reads must not use anything before all of it was read.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.memory.records import VALUE, RecordsSnapshot

VERSION = 1
STATE_FOLDER = "regate"  # in the folder of an iteration
MANIFEST = "state.json"
PRIOR = "prior.npy"
SAVED_ENTRY = np.dtype([("key", "<i8", 2), ("count", "<i4"), ("seen", "<i4")])
_CHUNK = 8192  # samples read at once


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file: its size in bytes, its xxh3 checksum (128 bits), what it holds."""

    bytes: int
    checksum: str
    num_samples: int = 0
    num_targets: int = 0


@dataclass(frozen=True)
class SavedRecords:
    """Some saved records: key [N, 2], targets per sample [N], last step seen [N], float16 values of all."""

    key_N2: np.ndarray
    count_N: np.ndarray
    seen_N: np.ndarray
    value_X: np.ndarray


def records_name(dp_rank: int) -> str:
    """The file of one planner."""
    return f"difficulty-{dp_rank:05d}.npy"


def write_records(path: Path, records: RecordsSnapshot) -> FileFacts:
    """Write one planner's records, to the disk itself."""
    with _HashingFile(path, "wb") as file:
        file.write(_header(SAVED_ENTRY, records.num_samples))
        for entries in records.entries:
            saved = np.empty(len(entries), SAVED_ENTRY)
            for field in SAVED_ENTRY.names:
                saved[field] = entries[field]
            file.write(saved.view(np.uint8).data)
        file.write(_header(VALUE, records.num_targets))
        for values in records.values:
            file.write(values.view(np.uint8).data)
        return file.facts(records.num_samples, records.num_targets)


def read_records(path: Path, facts: FileFacts, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[SavedRecords]:
    """The records of one file of which ``wanted(key_N2)`` says True, in pieces.

    Raises:
        ReGateError: the file is missing, truncated or damaged; at the end at the latest.
    """
    with _checked(path, facts) as file:
        saved = np.frombuffer(_read_array(file, SAVED_ENTRY, facts.num_samples), SAVED_ENTRY)
        _read_header(file, VALUE, facts.num_targets)
        if int(saved["count"].sum(dtype=np.int64)) != facts.num_targets or (saved["count"] < 0).any():
            raise _damaged(path, "numbers of targets that do not add up")
        for first in range(0, len(saved), _CHUNK):
            chunk = saved[first : first + _CHUNK]
            value_X = np.frombuffer(file.read(int(chunk["count"].sum()) * VALUE.itemsize), VALUE)
            own_N = wanted(chunk["key"])
            own = chunk[own_N]
            yield SavedRecords(own["key"], own["count"], own["seen"], value_X[np.repeat(own_N, chunk["count"])])
        file.check(facts)


def write_array(path: Path, array_X: np.ndarray) -> FileFacts:
    """Write one array, to the disk itself."""
    with _HashingFile(path, "wb") as file:
        file.write(_header(array_X.dtype, len(array_X)))
        file.write(np.ascontiguousarray(array_X).view(np.uint8).data)
        return file.facts(0, len(array_X))


def read_array(path: Path, facts: FileFacts, dtype: np.dtype) -> np.ndarray:
    """One array, whole and checked.

    Raises:
        ReGateError: as :func:`read_records`.
    """
    with _checked(path, facts) as file:
        array_X = np.frombuffer(_read_array(file, dtype, facts.num_targets), dtype).copy()
        file.check(facts)
        return array_X


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest; the last file, without which the others are nothing."""
    body = dict(content, version=VERSION)
    with (folder / MANIFEST).open("w") as file:
        json.dump(dict(body, checksum=_checksum_of(body)), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked.

    Raises:
        ReGateError: it is missing, damaged, or of another version of this library.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
        version = content["version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"unreadable ({type(error).__name__})") from error
    if checksum != _checksum_of(content):
        raise _damaged(path, "a wrong checksum")
    if version != VERSION:
        raise _damaged(path, f"version {version} where this library writes {VERSION}")
    return content


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(path: Path, what: str) -> ReGateError:
    return refuse(
        "saved difficulty",
        given=f"{path} with {what}",
        allowed="the complete folder as it was saved",
        change="to an earlier checkpoint (--ckpt-step), or add --regate-reset-difficulty to start it empty",
    )


def _checksum_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


class _HashingFile:
    """A file whose bytes are counted and hashed as they pass."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self._file = path, path.open(mode)
        self._digest, self._count = xxhash.xxh3_128(), 0

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> None:
        self._count += len(data)
        self._digest.update(data)
        self._file.write(data)

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise _damaged(self.path, "an early end")
        self._count += count
        self._digest.update(data)
        return data

    def facts(self, num_samples: int, num_targets: int) -> FileFacts:
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileFacts(self._count, self._digest.hexdigest(), num_samples, num_targets)

    def check(self, facts: FileFacts) -> None:
        if self._count != facts.bytes or self._digest.hexdigest() != facts.checksum:
            raise _damaged(self.path, "a wrong checksum")


def _checked(path: Path, facts: FileFacts) -> _HashingFile:
    try:
        size = path.stat().st_size
        if size != facts.bytes:
            raise _damaged(path, f"{size} bytes of {facts.bytes}")
        return _HashingFile(path, "rb")
    except OSError as error:
        raise _damaged(path, f"no file to read ({error.strerror})") from error


def _header(dtype: np.dtype, length: int) -> bytes:
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _read_header(file: _HashingFile, dtype: np.dtype, length: int) -> None:
    expected = _header(dtype, length)
    if file.read(len(expected)) != expected:
        raise _damaged(file.path, "another array than the manifest says")


def _read_array(file: _HashingFile, dtype: np.dtype, length: int) -> bytes:
    _read_header(file, dtype, length)
    return file.read(length * dtype.itemsize)
