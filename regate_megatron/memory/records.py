"""A bounded container of float16 records by 128-bit key, on one rank: numpy, nothing per record in Python.

Records lie one after another in an arena of fixed-size blocks, so that growing copies nothing. Beside it, in blocks
too, lies one entry of 32 bytes per record; a table of open addressing (4 bytes a slot, a third to two thirds full)
finds an entry by its key. A record is known by key *and* length: with another number of targets it is another record.

When the records pass the memory bound, those seen least recently go, whole steps at a time, until at most 7/8 of the
bound is in use; what is left moves together. The rule looks at keys' last steps and at counts only, never at how the
arena happens to lie, so that a reloaded container forgets what an uninterrupted one does.

Shapes: N records of a call (distinct keys), X values of all of them, L values of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch

from regate_megatron.memory.files import VALUE, Piece

ENTRY = np.dtype([("key", "<i8", 2), ("start", "<i8"), ("count", "<i4"), ("seen", "<i4")])
BYTES_PER_SAMPLE = ENTRY.itemsize + 12  # a slot of the table takes 4 bytes, of which a third are in use at least
_KEEP_AFTER_EVICTION = 7 / 8
_CHUNK = 8192  # entries handled at once where all are gone through
_VALUES_PER_BLOCK, _ENTRIES_PER_BLOCK = 1 << 22, 1 << 16  # 8 MiB, 2 MiB


class Blocks:
    """A growing one-dimensional array in blocks of fixed length; a snapshot of it costs nothing until it is written."""

    def __init__(self, dtype: np.dtype, block_length: int) -> None:
        self.dtype, self.block_length, self.length = dtype, block_length, 0
        self.blocks: list[np.ndarray] = []
        self._shared: set[int] = set()

    def append(self, values_X: np.ndarray) -> None:
        """Add values at the end."""
        start, self.length = self.length, self.length + len(values_X)
        while len(self.blocks) * self.block_length < self.length:
            self.blocks.append(np.empty(self.block_length, self.dtype))
        self.write(start, values_X)

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` values from ``start``; a view where they lie in one block."""
        pieces = [self.blocks[block][low:high] for block, low, high in self._spans(start, count)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def write(self, start: int, values_X: np.ndarray) -> None:
        """Put values at ``start`` and after."""
        at = 0
        for block, low, high in self._spans(start, len(values_X)):
            self._own(block)[low:high] = values_X[at : at + high - low]
            at += high - low

    def take(self, index_N: np.ndarray) -> np.ndarray:
        """The values at these places; a copy."""
        out_N = np.empty(len(index_N), self.dtype)
        block_N, place_N = np.divmod(index_N, self.block_length)
        for block in np.unique(block_N):
            here_N = block_N == block
            out_N[here_N] = self.blocks[block][place_N[here_N]]
        return out_N

    def put(self, index_N: np.ndarray, field: str, value: object) -> None:
        """Set one field of the entries at these places."""
        block_N, place_N = np.divmod(index_N, self.block_length)
        for block in np.unique(block_N):
            self._own(block)[field][place_N[block_N == block]] = value

    def truncate(self, length: int) -> None:
        """Forget what lies at ``length`` and after; its blocks are freed."""
        self.length = length
        del self.blocks[-(-length // self.block_length) :]
        self._shared &= set(range(len(self.blocks)))

    def snapshot(self) -> Blocks:
        """The array as it is now, to be read: a block is copied when it is next written, until :meth:`release`."""
        self._shared = set(range(len(self.blocks)))
        frozen = copy.copy(self)
        frozen.blocks = list(self.blocks)
        return frozen

    def release(self) -> None:
        """No snapshot is in use any more."""
        self._shared.clear()

    def _own(self, block: int) -> np.ndarray:
        if block in self._shared:
            self._shared.discard(block)
            self.blocks[block] = self.blocks[block].copy()
        return self.blocks[block]

    def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        while count > 0:
            block, low = divmod(start, self.block_length)
            high = min(self.block_length, low + count)
            yield block, low, high
            start, count = start + high - low, count - (high - low)


class RecordsSnapshot:
    """All records of one rank at one moment, one after the other."""

    def __init__(self, entries: Blocks, values: Blocks) -> None:
        self._entries, self._values = entries, values

    def __len__(self) -> int:
        return self._entries.length

    def pieces(self) -> Iterator[Piece]:
        """The records, some at a time; shared with the container where they lie in one block."""
        for first in range(0, len(self), _CHUNK):
            entries = self._entries.read(first, min(_CHUNK, len(self) - first))
            value_X = self._values.read(int(entries["start"][0]), int(entries["count"].sum()))
            yield Piece(entries["key"], entries["count"], entries["seen"], value_X)


class Records:
    """Float16 records by key and length; NaN where never observed.

    Args:
        limit_bytes: host memory that records, entries and table may take between two steps.
    """

    def __init__(self, limit_bytes: float, *, values_per_block: int = _VALUES_PER_BLOCK) -> None:
        self.limit_bytes = limit_bytes
        self.evicted_samples = 0
        self._values = Blocks(VALUE, values_per_block)
        self._entries = Blocks(ENTRY, _ENTRIES_PER_BLOCK)
        self._table = np.full(1024, -1, np.int32)
        self._snapshots = 0

    def __len__(self) -> int:
        return self._entries.length

    @property
    def num_targets(self) -> int:
        """Values in all records."""
        return self._values.length

    @property
    def bytes_used(self) -> int:
        """What counts against the bound."""
        return _bytes(len(self), self.num_targets)

    def read(self, key_N2: np.ndarray, count_N: np.ndarray) -> np.ndarray:
        """The records of these keys one after another, float16 [X]; NaN where there is none."""
        return self._gather(self._find(key_N2, count_N), count_N)

    def observe(self, key_N2: np.ndarray, count_N: np.ndarray, loss_X: np.ndarray, *, decay: float, step: int) -> None:
        """Take in losses, float32 [X], NaN where a target did not run; keys are distinct.

        ``m ← β·m + (1−β)·ℓ`` in float32, rounded to float16 (to nearest, at most 65504); the first finite loss sets m.
        """
        real_N = count_N > 0
        key_N2, count_N = key_N2[real_N], count_N[real_N]
        index_N = self._find(key_N2, count_N)
        new_N = index_N < 0
        if new_N.any():
            empty_X = np.full(int(count_N[new_N].sum()), np.nan, VALUE)
            index_N[new_N] = self._append(key_N2[new_N], count_N[new_N], np.full(new_N.sum(), step), empty_X)
        self._entries.put(index_N, "seen", step)
        # torch converts to and from float16 ten times as fast as numpy, to the same numbers
        before_X, loss_X = torch.from_numpy(self._gather(index_N, count_N)).float(), torch.from_numpy(loss_X)
        after_X = torch.where(before_X.isnan(), loss_X, decay * before_X + (1 - decay) * loss_X)
        highest = float(np.finfo(VALUE).max)
        after_X = torch.where(loss_X.isfinite(), after_X.clamp(-highest, highest), before_X).half().numpy()
        starts = self._entries.take(index_N)["start"].tolist()
        at = 0
        for start, count in zip(starts, count_N.tolist(), strict=True):
            self._values.write(start, after_X[at : at + count])
            at += count

    def append(self, piece: Piece) -> None:
        """Add whole records that are not there yet, as they were saved."""
        self._append(piece.key_N2, piece.count_N, piece.seen_N, piece.value_X)

    def evict(self) -> None:
        """Forget the records seen least recently if the bound is passed; the rule is in the module's text."""
        if self.bytes_used <= self.limit_bytes:
            return
        every = [(entry["seen"], entry["count"]) for entry in self._chunks()]
        seen_N, count_N = (np.concatenate(column) for column in zip(*every, strict=True))
        steps, of_N = np.unique(seen_N, return_inverse=True)
        samples = np.bincount(of_N)
        targets = np.bincount(of_N, weights=count_N).astype(np.int64)
        left = _bytes(len(self) - samples.cumsum(), self.num_targets - targets.cumsum())
        last = steps[np.argmax(left <= _KEEP_AFTER_EVICTION * self.limit_bytes)]  # nothing is left after the last step
        self._keep(seen_N > last)

    def snapshot(self) -> RecordsSnapshot:
        """All records as they are now; shared with this container until :meth:`release`, once per snapshot."""
        self._snapshots += 1
        return RecordsSnapshot(self._entries.snapshot(), self._values.snapshot())

    def release(self) -> None:
        """A snapshot is in use no more."""
        self._snapshots -= 1
        if not self._snapshots:
            self._entries.release()
            self._values.release()

    def _find(self, key_N2: np.ndarray, count_N: np.ndarray) -> np.ndarray:
        """The entry of each key, -1 where there is none."""
        index_N = np.full(len(key_N2), -1, np.int64)
        slot_N, todo = self._slot(key_N2), np.arange(len(key_N2))
        while len(todo):
            entry_X = self._table[slot_N[todo]].astype(np.int64)
            taken_X = entry_X >= 0
            todo, entry_X = todo[taken_X], entry_X[taken_X]
            found = self._entries.take(entry_X)
            same_X = (found["key"] == key_N2[todo]).all(axis=1) & (found["count"] == count_N[todo])
            index_N[todo[same_X]] = entry_X[same_X]
            todo = todo[~same_X]
            slot_N[todo] = (slot_N[todo] + 1) % len(self._table)
        return index_N

    def _append(self, key_N2: np.ndarray, count_N: np.ndarray, seen_N: np.ndarray, value_X: np.ndarray) -> np.ndarray:
        first, entries = len(self), np.empty(len(key_N2), ENTRY)
        entries["key"], entries["count"], entries["seen"] = key_N2, count_N, seen_N
        entries["start"] = self.num_targets + np.cumsum(count_N) - count_N
        self._entries.append(entries)
        self._values.append(value_X)
        index_N = np.arange(first, len(self))
        if 3 * len(self) > 2 * len(self._table):
            self._rebuild_table()
        else:
            self._insert(key_N2, index_N)
        return index_N

    def _gather(self, index_N: np.ndarray, count_N: np.ndarray) -> np.ndarray:
        start_N = np.where(index_N >= 0, self._entries.take(index_N.clip(0))["start"] if len(self) else 0, -1)
        pieces = [
            self._values.read(start, count) if start >= 0 else np.full(count, np.nan, VALUE)
            for start, count in zip(start_N.tolist(), count_N.tolist(), strict=True)
        ]
        return np.concatenate([np.empty(0, VALUE), *pieces])

    def _keep(self, keep_N: np.ndarray) -> None:
        """Drop all other records; what is left moves together, in place."""
        samples = targets = 0
        for first in range(0, len(self), _CHUNK):
            entries = self._entries.read(first, min(_CHUNK, len(self) - first)).copy()
            value_X = self._values.read(int(entries["start"][0]), int(entries["count"].sum()))
            own_X = keep_N[first : first + len(entries)]
            value_X, entries = value_X[np.repeat(own_X, entries["count"])], entries[own_X]
            entries["start"] = targets + np.cumsum(entries["count"]) - entries["count"]
            self._entries.write(samples, entries)
            self._values.write(targets, value_X)
            samples, targets = samples + len(entries), targets + len(value_X)
        self.evicted_samples += len(self) - samples
        self._entries.truncate(samples)
        self._values.truncate(targets)
        self._rebuild_table()

    def _rebuild_table(self) -> None:
        size = 1024
        while 3 * len(self) > size:  # a third full, so that it grows long before it is rebuilt
            size *= 2
        self._table = np.full(size, -1, np.int32)
        first = 0
        for entries in self._chunks():
            self._insert(entries["key"], np.arange(first, first + len(entries)))
            first += len(entries)

    def _insert(self, key_N2: np.ndarray, index_N: np.ndarray) -> None:
        slot_N, todo = self._slot(key_N2), np.arange(len(key_N2))
        while len(todo):
            free_X = self._table[slot_N[todo]] < 0
            self._table[slot_N[todo[free_X]]] = index_N[todo[free_X]]  # of several that want one slot, the last wins
            todo = todo[self._table[slot_N[todo]] != index_N[todo]]
            slot_N[todo] = (slot_N[todo] + 1) % len(self._table)

    def _slot(self, key_N2: np.ndarray) -> np.ndarray:
        mixed_N = key_N2[:, 0].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key_N2[:, 1].astype(np.uint64)
        return ((mixed_N ^ (mixed_N >> np.uint64(32))) % np.uint64(len(self._table))).astype(np.int64)

    def _chunks(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self), _CHUNK):
            yield self._entries.read(first, min(_CHUNK, len(self) - first))


def _bytes(samples: int | np.ndarray, targets: int | np.ndarray) -> int | np.ndarray:
    return targets * VALUE.itemsize + samples * BYTES_PER_SAMPLE
