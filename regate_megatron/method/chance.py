"""Pseudo-random numbers made from seed, step and content alone: every rank, in every layout, draws the same ones."""

import torch
from torch import Tensor

_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # splitmix64, as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def uniform_in_0_1(key_N2: Tensor, place_X: Tensor, count_N: Tensor | None = None, *, seed: int, step: int) -> Tensor:
    """A number in [0, 1) made from (seed, step, content key, place); float64 [X].

    Args:
        key_N2: 128-bit content keys, int64 [N, 2].
        place_X: places in the sample, int64 [X].
        count_N: how many places in turn each key is for, int64 [N]; None: one each.
    """
    state_X = _mix(_mix(key_N2[..., 0] ^ _mix(torch.tensor(seed) + _GOLDEN)) ^ key_N2[..., 1])
    state_X = _mix(state_X + _GOLDEN * torch.tensor(step + 1))
    if count_N is not None:
        state_X = state_X.repeat_interleave(count_N)
    state_X = _mix(state_X + _GOLDEN * (place_X + 1))
    return _shift_right(state_X, 11).double() / float(1 << 53)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the mask makes them logical


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic wraps)."""
    x = (x ^ _shift_right(x, 30)) * _MIX[0]
    x = (x ^ _shift_right(x, 27)) * _MIX[1]
    return x ^ _shift_right(x, 31)
