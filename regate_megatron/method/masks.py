"""Reading and writing through boolean masks on the host: numpy does it about ten times faster than torch.

Tensors are on the CPU and share their memory with the arrays; nothing is copied on the way.
"""

import torch
from torch import Tensor


def take(value: Tensor, where: Tensor) -> Tensor:
    """``value[where]``, in order; [X]."""
    return torch.from_numpy(value.numpy()[where.numpy()])


def put(value: Tensor, where: Tensor, into: Tensor) -> Tensor:
    """A copy of ``into`` with ``value`` [X] at ``where``, in order."""
    copy = into.numpy().copy()
    copy[where.numpy()] = value.numpy()
    return torch.from_numpy(copy)
