"""Reference losses that were computed: in a cache on disk, or in host memory alone.

The cache holds one float16 per target, found by the sample's reference key, in files of records (:mod:`.files`). Keys
are made of token ids and layout, so it knows nothing of order, seed, batch shape, layout or vocabulary padding.
Any number of planners of any number of jobs write at once, each its own immutable files; nothing is locked. Losses wait
in memory until a thread writes them, which also looks for files of others; it issues no collective.
A kill loses what waited: the last minute, or a twentieth of the run where that is more.

Memory: 16 bytes per record on disk (see :mod:`.key_index`), and what waits to be written, at most twice
:data:`MAX_WAITING_BYTES`. Losses are read from the file system's page cache, so there is no layer to evict.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_megatron.memory.files import RECORDS, TABLE, DamagedFile, Piece, RecordFile, write_records
from regate_megatron.memory.key_index import KeyIndex
from regate_megatron.memory.token_statistics import TokenStatistics

LOSS_FOLDER, TOKEN_FOLDER = "losses", "tokens"
WRITE_SECONDS = 60
MAX_WAITING_BYTES = 64 << 20
_SHARE_OF_RUN = 0.05  # so that a run of days leaves some hundred files, not thousands
_BYTES_PER_WAITING_RECORD = 300  # Python's own, roughly
_MAX_BYTES_IN_MEMORY = 2 << 30
_BYTES_PER_RECORD_IN_MEMORY = 400  # Python's and torch's own, roughly
_MOST_OPEN_FILES = 256
_LARGEST = torch.finfo(torch.float16).max


def rounded(loss_T: Tensor) -> Tensor:
    """Finite losses as the cache keeps them, float32: fresh ones are used like this too, so that plans are equal."""
    return loss_T.clamp_max(_LARGEST).half().float()


class ReferenceCache:
    """Losses in ``directory``; used by one thread of one rank.

    Args:
        directory: the cache; claimed for its teacher before.
        writer: names this rank's files, with a random part.
        write_seconds: how long a loss waits at most before it is written, early in a run.
    """

    rounds = True

    def __init__(self, directory: str | Path, writer: str, *, write_seconds: float = WRITE_SECONDS) -> None:
        self.directory = Path(directory)
        self._losses, self._tokens = self.directory / LOSS_FOLDER, self.directory / TOKEN_FOLDER
        for folder in (self._losses, self._tokens):
            folder.mkdir(parents=True, exist_ok=True)
        self._stem, self._written = f"{writer}-{uuid.uuid4().hex[:12]}", 0
        self._index, self._files, self._seen = KeyIndex(), [], set()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._reported: set[Path] = set()
        self._waiting: dict[bytes, np.ndarray] = {}
        self._being_written: dict[bytes, np.ndarray] = {}
        self._statistics = TokenStatistics()
        self._waiting_bytes = 0
        self._start, self._write_seconds = time.monotonic(), write_seconds
        self._state = threading.Condition()
        self._work = threading.Lock()  # held while files are written or looked for
        self._stop = self._wants_write = False
        self._thread: threading.Thread | None = None
        self.refresh()

    def __len__(self) -> int:
        """Records on disk, as far as known; a sample written by two replicas counts twice."""
        return len(self._index)

    def look_up(self, keys: Sequence[bytes], counts: Sequence[int]) -> list[Tensor | None]:
        """What is known of each sample, float32 [T] rounded to float16; None where it has to be computed.

        Args:
            keys: 16 bytes each.
            counts: T of each sample.
        """
        # In the order a loss moves, so that none is missed on its way: waiting, being written, on disk.
        waiting, being_written = self._waiting, self._being_written
        found = [waiting.get(key, being_written.get(key)) for key in keys]
        missing = [number for number, loss in enumerate(found) if loss is None]
        first_N = np.array([int.from_bytes(keys[number][:8], "little", signed=True) for number in missing], np.int64)
        for number, places in zip(missing, self._index.find(first_N), strict=True):
            found[number] = self._read(keys[number], places)
        return [
            torch.from_numpy(loss.astype(np.float32)) if loss is not None and len(loss) == count else None
            for loss, count in zip(found, counts, strict=True)
        ]

    def add(self, keys: Sequence[bytes], losses: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Keep finite losses; returns at once unless the disk is far behind.

        Args:
            keys: 16 bytes each.
            losses: float32 [T] each, rounded by :func:`rounded`.
            labels: the token each target predicts, int64 [T] each.
        """
        self._start_thread()
        if self._waiting_bytes > 2 * MAX_WAITING_BYTES:
            self._write()
        with self._state:
            for key, loss_T, label_T in zip(keys, losses, labels, strict=True):
                loss = loss_T.numpy().astype(np.float16)
                assert np.isfinite(loss).all(), "a loss that is not finite reached the cache"
                self._waiting[key] = loss
                self._waiting_bytes += loss.nbytes + _BYTES_PER_WAITING_RECORD
                self._statistics.add(label_T.numpy(), loss)
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._wants_write = True
                self._state.notify_all()

    def flush(self) -> None:
        """Write what waits; on disk when this returns."""
        self._write()

    def refresh(self) -> None:
        """Find files written since, by this rank or others."""
        with self._work:
            self._find_files()

    def close(self) -> None:
        """Write what waits and end the thread; harmless twice."""
        with self._state:
            self._stop = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._write()
        while self._open:
            os.close(self._open.popitem()[1])
        atexit.unregister(self.close)

    def describe(self) -> str:
        """One line."""
        waiting = len(self._waiting) + len(self._being_written)
        on_disk = f"{len(self):,} records in {len(self._files)} files"
        return f"reference losses: {self.directory}, {on_disk}, {waiting} not yet written"

    def _read(self, key: bytes, places: Sequence[tuple[int, int]]) -> np.ndarray | None:
        for file, row in places:
            try:
                loss = self._files[file].read(self._descriptor(file), row, key)
            except (DamagedFile, OSError) as error:
                self._report(self._files[file].path, error)
                continue
            if loss is not None:
                return loss
        return None

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            if len(self._open) >= _MOST_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[file] = os.open(self._files[file].path, os.O_RDONLY)
        self._open.move_to_end(file)
        return descriptor

    def _start_thread(self) -> None:
        if self._thread is None and not self._stop:
            self._thread = threading.Thread(target=self._run, name="regate-cache", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # for scripts that end without saying so; it does not help against a kill

    def _run(self) -> None:
        while True:
            with self._state:
                wait = max(self._write_seconds, _SHARE_OF_RUN * (time.monotonic() - self._start))
                if not self._stop and not self._wants_write:
                    self._state.wait(wait)
                if self._stop:
                    return
                self._wants_write = False
            self._write()

    def _write(self) -> None:
        with self._work:
            with self._state:
                records, statistics = self._waiting, self._statistics
                self._being_written, self._waiting, self._statistics = records, {}, TokenStatistics()
                self._waiting_bytes = 0
            stem = f"{self._stem}-{self._written:06d}"
            try:
                if records:
                    write_losses(self._losses / f"{stem}{RECORDS}", records)
                    statistics.write(self._tokens / f"{stem}{TABLE}")
                    self._written += 1
                self._find_files()
            except OSError as error:  # training goes on: these losses will be computed again
                self._report(self._losses, f"{len(records)} losses not written: {error.strerror or error}")
            self._being_written = {}

    def _find_files(self) -> None:
        for entry in sorted(os.listdir(self._losses)):
            if entry.startswith(".") or not entry.endswith(RECORDS) or entry in self._seen:
                continue
            self._seen.add(entry)
            try:
                file, entry_N = RecordFile.open(self._losses / entry)
            except (DamagedFile, OSError) as error:
                self._report(self._losses / entry, error)
                continue
            self._files.append(file)
            self._index.add(entry_N["key"][:, 0].copy(), len(self._files) - 1)

    def _report(self, path: Path, reason: object) -> None:
        """Say once per file that it, or a record of it, is left out."""
        if path not in self._reported:
            self._reported.add(path)
            print(f"[regate] reference cache: {path}: {reason}; the teacher computes this again", flush=True)


def write_losses(path: Path, records: dict[bytes, np.ndarray]) -> None:
    """Write losses by key (16 bytes each, float16 [T]) as one file."""
    key_N2 = np.frombuffer(b"".join(records), "<i8").reshape(-1, 2)
    count_N = np.array([len(loss) for loss in records.values()])
    piece = Piece(key_N2, count_N, np.zeros_like(count_N), np.concatenate(list(records.values())))
    write_records(path, len(records), lambda: [piece])


class RecentLosses:
    """float32 losses by key, the least recently used forgotten first (the teacher computes them again).

    Args:
        max_bytes: what it may take.
    """

    rounds = False

    def __init__(self, max_bytes: int = _MAX_BYTES_IN_MEMORY) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def look_up(self, keys: Sequence[bytes], counts: Sequence[int]) -> list[Tensor | None]:
        """What is known of each sample, float32 [T]; None where it has to be computed."""
        found = []
        for key, count in zip(keys, counts, strict=True):
            loss_T = self._known.get(key)
            if loss_T is not None:
                self._known.move_to_end(key)
            found.append(loss_T if loss_T is not None and len(loss_T) == count else None)
        return found

    def add(self, keys: Sequence[bytes], losses: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Remember finite losses, float32 [T] each; ``labels`` are not needed here."""
        for key, loss_T in zip(keys, losses, strict=True):
            before = self._known.pop(key, None)
            self._known[key] = loss_T
            self._bytes += _size(loss_T) - (_size(before) if before is not None else 0)
        while self._bytes > self.max_bytes and self._known:
            self._bytes -= _size(self._known.popitem(last=False)[1])

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def describe(self) -> str:
        """One line."""
        return f"reference losses: in memory, {len(self._known):,} samples, at most {self.max_bytes / 2**30:g} GiB"


def _size(loss_T: Tensor) -> int:
    return loss_T.numel() * torch.float32.itemsize + _BYTES_PER_RECORD_IN_MEMORY
