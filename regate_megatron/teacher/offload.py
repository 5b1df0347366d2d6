"""Keep the teacher's weights on the host between uses.

They never change, so the host copy is made once (pinned, where there is a GPU) and stays; leaving the device frees the
copy there and moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Offloaded:
    """The weights of ``chunks`` on the host; :meth:`bring` and :meth:`leave` swap what its parameters hold.

    Buffers stay: they are small, and the teacher shares its rotary frequencies with the student.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]  # tied weights once
        self.device = self._parameters[0].device
        self._host = []
        for parameter in self._parameters:
            pinned = self.device.type == "cuda"
            host = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
            self._host.append(host.copy_(parameter.data))
        self.is_on_device = True
        self.leave()

    @property
    def num_bytes(self) -> int:
        """What the weights take, on the host always and on the device while in use."""
        return sum(host.numel() * host.element_size() for host in self._host)

    def bring(self) -> None:
        """Copy the weights to the device, on its current stream; nothing when they are there."""
        if not self.is_on_device:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
            self.is_on_device = True

    def leave(self) -> None:
        """Free the device's copy; nothing when it is free."""
        if self.is_on_device:
            for parameter, host in zip(self._parameters, self._host, strict=True):
                parameter.data = host
            self.is_on_device = False
