"""Files of the reference-loss cache: written once, whole or not at all, and never trusted unread.

A file is plain Arrow IPC, so any Arrow reader opens it. Its name ends in ``.HEAD.TAIL.HASH.arrow``: the number of bytes
before and after the losses, and the xxh3 of those bytes. They are what says where everything lies; they are read and
checked when the file is opened, the losses are not. Each record carries a checksum of its own, checked at every read.
So opening costs 24 bytes per record however large the file is, and no damaged loss is ever used.

Reads go through ``pread``: a mapped file that a network file system loses or cuts would kill the process.

Shapes: N records of a file, T targets of a record.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

KEY_BYTES = 16
SUFFIX = ".arrow"
_INCOMPLETE = ".incomplete"
LOSS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("check", pa.uint32(), nullable=False),
        pa.field("loss", pa.list_(pa.field("item", pa.float16(), nullable=False)), nullable=False),
    ]
)


class DamagedFile(Exception):
    """A file that is not what its name says; the text is the reason."""


class LossFile:
    """An opened file of losses: where its records lie. Holds no descriptor."""

    def __init__(self, path: Path, batch: Any, base: int, keys: np.ndarray) -> None:
        self.path, self.key_N2, self.num_records = path, keys, len(keys)
        key, check, loss = (column.buffers() for column in batch.columns)
        self._key_at, self._check_at = key[1].address - base, check[1].address - base
        self._offset_at, self._loss_at = loss[1].address - base, loss[3].address - base

    @classmethod
    def open(cls, path: Path) -> LossFile:
        """Read what frames the losses, and check it.

        Raises:
            DamagedFile: truncated, changed, or not one of ours.
            OSError: it cannot be read at all.
        """
        head = _checked_frame(path)
        try:
            with pa.memory_map(str(path)) as source:
                base = source.read_buffer(1).address
                source.seek(0)
                reader = pa.ipc.open_file(source)
                if not reader.schema.equals(LOSS_SCHEMA) or reader.num_record_batches != 1:
                    raise DamagedFile("another layout")
                batch = reader.get_batch(0)
                start = batch.column(0).buffers()[1].address - base
                keys = np.frombuffer(head, np.int64, 2 * batch.num_rows, start).reshape(-1, 2)
                return cls(path, batch, base, keys)
        except (pa.ArrowException, ValueError) as error:
            raise DamagedFile(str(error)) from error

    def read(self, descriptor: int, row: int, key: bytes) -> np.ndarray | None:
        """The losses of one record, float16 [T]; None where it is of another key that shares its first half.

        Raises:
            DamagedFile: the record does not match its checksum.
        """
        if os.pread(descriptor, KEY_BYTES, self._key_at + KEY_BYTES * row) != key:
            return None
        check = os.pread(descriptor, 4, self._check_at + 4 * row)
        start, stop = np.frombuffer(_exactly(descriptor, 8, self._offset_at + 4 * row), np.int32).tolist()
        if not 0 <= start <= stop:
            raise DamagedFile("a record without an end")
        data = os.pread(descriptor, 2 * (stop - start), self._loss_at + 2 * start)
        if _checksum(key, data) != int.from_bytes(check, "little") or len(data) != 2 * (stop - start):
            raise DamagedFile("a record that does not match its checksum")
        return np.frombuffer(data, np.float16)

    def records(self) -> Iterator[tuple[bytes, np.ndarray]]:
        """All records, in the order of the file: key, float16 [T].

        Raises:
            DamagedFile: the next record does not match its checksum.
        """
        keys = np.ascontiguousarray(self.key_N2)
        with self.path.open("rb") as file:
            for row in range(self.num_records):
                key = keys[row].tobytes()
                loss = self.read(file.fileno(), row, key)
                if loss is None:
                    raise DamagedFile("it changed while it was read")
                yield key, loss


def write_losses(folder: Path, stem: str, keys: Sequence[bytes], losses: Sequence[np.ndarray]) -> Path:
    """Write records (16-byte keys, float16 [T] each) as one file; returns its path."""
    order = sorted(range(len(keys)), key=lambda row: int.from_bytes(keys[row][:8], "little", signed=True))
    keys, losses = [keys[row] for row in order], [losses[row] for row in order]
    checks = [_checksum(key, loss.tobytes()) for key, loss in zip(keys, losses, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(loss) for loss in losses])]).astype(np.int32)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(b"".join(keys))]),
        pa.array(np.array(checks, np.uint32)),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(losses)), type=LOSS_SCHEMA[2].type),
    ]
    buffer = _ipc(pa.record_batch(columns, schema=LOSS_SCHEMA))
    values = pa.ipc.open_file(buffer).get_batch(0).column("loss").buffers()[3]
    head = values.address - buffer.address
    return _write(folder, stem, buffer, head, buffer.size - head - values.size)


def write_table(folder: Path, stem: str, batch: pa.RecordBatch) -> Path:
    """Write a small table whose hash covers all of it; returns its path."""
    buffer = _ipc(batch)
    return _write(folder, stem, buffer, buffer.size, 0)


def read_table(path: Path) -> pa.Table:
    """Read what :func:`write_table` wrote.

    Raises:
        DamagedFile: truncated or changed.
    """
    try:
        return pa.ipc.open_file(pa.py_buffer(_checked_frame(path))).read_all()
    except pa.ArrowException as error:
        raise DamagedFile(str(error)) from error


def write_aside(path: Path, data: Any) -> None:
    """Put ``data`` at ``path`` whole or not at all, on disk when this returns."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_INCOMPLETE}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(folder: Path, stem: str, buffer: pa.Buffer, head: int, tail: int) -> Path:
    view = memoryview(buffer)
    path = folder / f"{stem}.{head}.{tail}.{_frame_hash(view[:head], view[len(view) - tail :])}{SUFFIX}"
    write_aside(path, view)
    return path


def _ipc(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _checked_frame(path: Path) -> bytes:
    """The bytes before the losses, once they and those behind match the file's name."""
    try:
        _, head, tail, expected, _ = path.name.rsplit(".", 4)
        head_bytes, tail_bytes = int(head), int(tail)
    except ValueError as error:
        raise DamagedFile("a name of another kind") from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        first = _exactly(descriptor, head_bytes, 0)
        last = _exactly(descriptor, tail_bytes, os.fstat(descriptor).st_size - tail_bytes) if tail_bytes else b""
    finally:
        os.close(descriptor)
    if _frame_hash(first, last) != expected:
        raise DamagedFile("its bytes do not match the hash in its name")
    return first


def _exactly(descriptor: int, count: int, offset: int) -> bytes:
    data = os.pread(descriptor, count, offset) if offset >= 0 else b""
    while 0 < len(data) < count:  # one read returns 2 GiB at most
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    if len(data) != count:
        raise DamagedFile("it ends early")
    return data


def _frame_hash(head: Any, tail: Any) -> str:
    digest = xxhash.xxh3_64(head)
    digest.update(tail)
    return digest.hexdigest()


def _checksum(key: bytes, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + data) & 0xFFFFFFFF
