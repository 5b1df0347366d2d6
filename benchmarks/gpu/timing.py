"""Time of a step and of its decoder: CUDA events on a GPU, CPU seconds in a rehearsal; and peak memory.

Events are recorded where the host launches the work and read once the device is done, so that timing adds no wait
inside a step. What the host spends between two launches counts as far as the device waits for it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Marks on the device's time line.

    Args:
        device: whose; a CPU's marks are CPU seconds of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two marks; the device must be done."""
        return start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start

    def settle(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


class DecoderTimer:
    """Time inside a transformer block: from its call to its return, and in backward from the gradient of its output to
    that of its input. What compacts is inside; embedding, LM head and loss are outside.
    """

    def __init__(self, block: Any, clock: Clock) -> None:
        self.clock = clock
        self.marks: list[Any] = []
        self._handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> float:
        """Seconds since the last call; the device must be done."""
        marks, self.marks = self.marks, []
        assert len(marks) % 2 == 0, "the block was left as often as entered"
        return sum(self.clock.seconds(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))

    def _enter(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["hidden_states"].register_hook(self._mark)
        self._mark()

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        self._mark()
        output.register_hook(self._mark)

    def _mark(self, gradient: Tensor | None = None) -> None:
        self.marks.append(self.clock.mark())


@dataclass
class Peak:
    """Peak memory of a step in bytes: all of it, and above what was there before (weights and gradients)."""

    total: int | None = None
    above: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Fill a :class:`Peak` when the block ends; it stays empty on a CPU, where torch counts none."""
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak.total = torch.cuda.max_memory_allocated()
    peak.above = peak.total - before


@contextlib.contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes that forwards in the block save for backward, each storage once: what memory means without a GPU."""
    seen: dict[int, Tensor] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))


@contextlib.contextmanager
def count_waits(device: torch.device) -> Iterator[list[int]]:
    """Count operations in the block that make the host wait for the device; none on a CPU."""
    counted: list[int] = []
    if device.type != "cuda":
        yield counted
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counted.append(sum("synchronizing CUDA operation" in str(one.message) for one in caught))
