"""Reference losses in host memory alone: what a run without a cache directory remembers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_BYTES = 2 << 30
_BYTES_PER_RECORD = 400  # Python's and torch's own, roughly


class RecentLosses:
    """float32 losses by key, the least recently used forgotten first (the teacher computes them again).

    Args:
        max_bytes: what it may take.
    """

    rounds = False

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
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
    return loss_T.numel() * torch.float32.itemsize + _BYTES_PER_RECORD
