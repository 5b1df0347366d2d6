"""Files of what is remembered: numpy's own format, written once, whole or not at all, and never trusted unread.

A file is numpy arrays one after the other, each as ``numpy.load`` reads it:

- *records*, float16 numbers by 128-bit key (difficulty, reference losses): an entry of 32 bytes per record, then the
  values of all records in that order, then the seal;
- a *table* (numbers by token id): its rows, then the seal.

The *seal* is a checksum of all bytes before it but the values of records, which have a check of their own in each
entry. So opening reads 32 bytes per record however long the records are, one record is read without the others, and no
damaged value is ever used. A manifest that names files keeps their seals, so that none can stand in for another.

Nothing is pickled. Single records are read with ``pread``: a mapped file that a network file system loses or cuts would
kill the process.

Shapes: N records, X values of all of them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from regate_megatron.ranks.publishing import written_aside

RECORDS, TABLE = ".records", ".table"  # how the names end
KEY_BYTES = 16
VALUE = np.dtype("<f2")
_ENTRY = np.dtype([("key", "<i8", 2), ("end", "<i8"), ("seen", "<i4"), ("check", "<u4")])
_ENTRY_FIELDS = struct.Struct(f"<{KEY_BYTES}sqiI")
_SEAL = np.dtype("<i8")
_CHUNK = 8192  # records read at once where all are


class DamagedFile(Exception):
    """A file that is not as it was written; the text is what is wrong with it."""


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file: its seal, how many records (or rows) it holds, and their values."""

    seal: int
    num_records: int
    num_values: int = 0


@dataclass(frozen=True)
class Piece:
    """Some records: key int64 [N, 2], values of each [N], last step seen [N], float16 values of all [X]."""

    key_N2: np.ndarray
    count_N: np.ndarray
    seen_N: np.ndarray
    value_X: np.ndarray


class RecordFile:
    """An opened file of records: where they lie. Holds no descriptor.

    Attributes:
        path: the file.
        facts: what it says of itself.
    """

    def __init__(self, path: Path, facts: FileFacts) -> None:
        self.path, self.facts = path, facts
        self._values_at = _ENTRY_HEADER + facts.num_records * _ENTRY.itemsize + _HEADER

    @classmethod
    def open(cls, path: Path) -> tuple[RecordFile, np.ndarray]:
        """Read and check all but the values; returns the file and its entries, a structured array [N] with ``key``.

        Raises:
            DamagedFile: truncated, changed, or no file of records.
            OSError: it cannot be read at all.
        """
        with path.open("rb") as file:
            size, digest = os.fstat(file.fileno()).st_size, xxhash.xxh3_64()
            entry_N = _take_array(file, _ENTRY, size, digest)
            num_values = _length(_take(file, _HEADER, digest), VALUE)
            if num_values != (int(entry_N["end"][-1]) if len(entry_N) else 0):
                raise DamagedFile("numbers of values that do not add up")
            expected = file.tell() + num_values * VALUE.itemsize + _HEADER + _SEAL.itemsize
            if size != expected:
                raise DamagedFile(f"{size} bytes of {expected}")
            file.seek(num_values * VALUE.itemsize, os.SEEK_CUR)
            seal = _take_seal(file, size, digest)
        return cls(path, FileFacts(seal, len(entry_N), num_values)), entry_N

    def read(self, descriptor: int, row: int, key: bytes) -> np.ndarray | None:
        """The values of one record, float16; None where it is of another key.

        Raises:
            DamagedFile: the record does not match its checksum.
        """
        first = max(0, row - 1)  # a record starts where the one before it ends
        data = _exactly(descriptor, (row + 1 - first) * _ENTRY.itemsize, _ENTRY_HEADER + first * _ENTRY.itemsize)
        own, end, _, check = _ENTRY_FIELDS.unpack_from(data, len(data) - _ENTRY.itemsize)
        if own != key:
            return None
        start = _ENTRY_FIELDS.unpack_from(data)[1] if row else 0
        if not 0 <= start <= end <= self.facts.num_values:
            raise DamagedFile("a record without an end")
        value_T = _exactly(descriptor, (end - start) * VALUE.itemsize, self._values_at + start * VALUE.itemsize)
        if _check(value_T) != check:
            raise DamagedFile(_WRONG_RECORD)
        return np.frombuffer(value_T, VALUE)

    def pieces(self, entry_N: np.ndarray, wanted: Callable[[np.ndarray], np.ndarray] | None = None) -> Iterator[Piece]:
        """All records in the order of the file, or those of which ``wanted(key_N2)`` says True.

        Args:
            entry_N: as :meth:`open` gave them.

        Raises:
            DamagedFile: one of the next records does not match its checksum.
        """
        with self.path.open("rb") as file:
            file.seek(self._values_at)
            start = 0
            for first in range(0, len(entry_N), _CHUNK):
                entries = entry_N[first : first + _CHUNK]
                count_N, start = np.diff(entries["end"], prepend=start), int(entries["end"][-1])
                value_X = np.frombuffer(_take(file, int(count_N.sum()) * VALUE.itemsize), VALUE)
                if wanted is not None:
                    own_N = wanted(entries["key"])
                    value_X = value_X[np.repeat(own_N, count_N)]
                    entries, count_N = entries[own_N], count_N[own_N]
                if (_checks(value_X, count_N) != entries["check"]).any():
                    raise DamagedFile(_WRONG_RECORD)
                yield Piece(entries["key"], count_N, entries["seen"], value_X)


def write_records(path: Path, num_records: int, pieces: Callable[[], Iterable[Piece]]) -> FileFacts:
    """Write records as one file, on the disk when this returns; ``pieces`` gives them, twice."""
    with written_aside(path) as file:
        digest, end = xxhash.xxh3_64(), 0
        _put(file, _header(_ENTRY, num_records), digest)
        for piece in pieces():
            entries = np.empty(len(piece.key_N2), _ENTRY)
            entries["key"], entries["seen"] = piece.key_N2, piece.seen_N
            entries["end"] = end + np.cumsum(piece.count_N, dtype=np.int64)
            entries["check"] = _checks(piece.value_X, piece.count_N)
            end += len(piece.value_X)
            _put(file, _bytes(entries), digest)
        _put(file, _header(VALUE, end), digest)
        for piece in pieces():
            file.write(_bytes(piece.value_X))
        return FileFacts(_put_seal(file, digest), num_records, end)


def write_table(path: Path, table_N: np.ndarray) -> FileFacts:
    """Write an array of one dimension, on the disk when this returns."""
    with written_aside(path) as file:
        digest = xxhash.xxh3_64()
        _put(file, _header(table_N.dtype, len(table_N)), digest)
        _put(file, _bytes(table_N), digest)
        return FileFacts(_put_seal(file, digest), len(table_N))


def read_table(path: Path, dtype: np.dtype) -> tuple[np.ndarray, FileFacts]:
    """A table with rows of ``dtype``, whole and checked, and what its file says of itself.

    Raises:
        DamagedFile, OSError: as :meth:`RecordFile.open`.
    """
    with path.open("rb") as file:
        size, digest = os.fstat(file.fileno()).st_size, xxhash.xxh3_64()
        table_N = _take_array(file, dtype, size, digest)
        return table_N.copy(), FileFacts(_take_seal(file, size, digest), len(table_N))


_WRONG_RECORD = "a record that does not match its checksum"


def _checks(value_X: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """The check of each record's values; uint32 [N]."""
    data, end_N = _bytes(value_X), np.cumsum(count_N) * VALUE.itemsize
    starts = (end_N - count_N * VALUE.itemsize).tolist()
    checks = [_check(data[start:end]) for start, end in zip(starts, end_N.tolist(), strict=True)]
    return np.array(checks, np.uint32)


def _check(data: Any) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _bytes(array_X: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array_X).view(np.uint8))


def _header(dtype: np.dtype, length: int) -> bytes:
    """What comes before an array, for :func:`numpy.load`; as long, and as worded, whatever the length and version."""
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({length:<18},), }}"
    size = -(-(_PREFIX.size + len(text) + 1) // 64) * 64 - _PREFIX.size
    return _PREFIX.pack(b"\x93NUMPY\x01\x00", size) + text.encode().ljust(size - 1) + b"\n"


_PREFIX = struct.Struct("<8sH")
_ENTRY_HEADER, _HEADER = len(_header(_ENTRY, 0)), len(_header(VALUE, 0))
assert len(_header(_SEAL, 0)) == _HEADER


def _length(header: bytes, dtype: np.dtype) -> int:
    found = re.search(rb"'shape': \((\d{1,18}) *,\)", header)
    if found is None or _header(dtype, int(found[1])) != header:
        raise DamagedFile("another array than there has to be")
    return int(found[1])


def _put(file: BinaryIO, data: Any, digest: xxhash.xxh3_64) -> None:
    file.write(data)
    digest.update(data)


def _put_seal(file: BinaryIO, digest: xxhash.xxh3_64) -> int:
    _put(file, _header(_SEAL, 1), digest)
    seal_1 = np.array([digest.intdigest()], "<u8").view(_SEAL)
    file.write(_bytes(seal_1))
    return int(seal_1[0])


def _take(file: BinaryIO, count: int, digest: xxhash.xxh3_64 | None = None) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise DamagedFile("an early end")
    if digest is not None:
        digest.update(data)
    return data


def _take_array(file: BinaryIO, dtype: np.dtype, size: int, digest: xxhash.xxh3_64) -> np.ndarray:
    length = _length(_take(file, len(_header(dtype, 0)), digest), dtype)
    if file.tell() + length * dtype.itemsize > size:
        raise DamagedFile("an early end")
    return np.frombuffer(_take(file, length * dtype.itemsize, digest), dtype)


def _take_seal(file: BinaryIO, size: int, digest: xxhash.xxh3_64) -> int:
    if _length(_take(file, _HEADER, digest), _SEAL) != 1:
        raise DamagedFile("another array than there has to be")
    expected = np.array([digest.intdigest()], "<u8").view(_SEAL)
    seal_1 = np.frombuffer(_take(file, _SEAL.itemsize), _SEAL)
    if seal_1 != expected or file.tell() != size:
        raise DamagedFile("a wrong checksum")
    return int(seal_1[0])


def _exactly(descriptor: int, count: int, offset: int) -> bytes:
    data = os.pread(descriptor, count, offset)
    if len(data) != count:
        raise DamagedFile("an early end")
    return data
