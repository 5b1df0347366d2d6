"""Difficulty and reference loss to the score that ranks target tokens. Torch only.

Shapes: X targets, of any samples. Losses are negative log-likelihoods in nats.
"""

import torch
from torch import Tensor

_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # splitmix64, as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def fuse(
    difficulty_X: Tensor, reference_X: Tensor | None, *, score: str, fusion: str, reference_weight: float
) -> Tensor:
    """The score of every target, float64 [X]; larger is kept first. Paper: ``d = m + λ·ℓref``.

    Args:
        difficulty_X: m, the running average of the student's loss, float [X].
        reference_X: ℓref, the frozen teacher's loss, float [X]; None where ``score`` is "student".
        score: "regate" (fused), "student" (m), "reference" (ℓref) or "excess" (m − ℓref, as Rho-1).
        fusion: "sum" (the printed formula) or "convex" ((1−λ)·m + λ·ℓref, which fits the paper's ablation better).
        reference_weight: λ.
    """
    difficulty_X = difficulty_X.double()
    if score == "student":
        return difficulty_X
    reference_X = reference_X.double()
    if score == "reference":
        return reference_X
    if score == "excess":
        return difficulty_X - reference_X
    student_weight = 1.0 if fusion == "sum" else 1.0 - reference_weight
    return student_weight * difficulty_X + reference_weight * reference_X


def random_score(key_X2: Tensor, place_X: Tensor, *, seed: int, step: int) -> Tensor:
    """A score in [0, 1) that depends on (seed, step, content key, place) alone; float64 [X].

    Args:
        key_X2: 128-bit content keys as int64 [X, 2]; the same sample scores the same on any rank and in any layout.
        place_X: places in the sample, int64 [X].
    """
    state_X = _mix(_mix(key_X2[..., 0] ^ _mix(torch.tensor(seed) + _GOLDEN)) ^ key_X2[..., 1])
    state_X = _mix(state_X + _GOLDEN * torch.tensor(step + 1))
    state_X = _mix(state_X + _GOLDEN * (place_X + 1))
    return _shift_right(state_X, 11).double() / float(1 << 53)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the mask makes them logical


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic wraps)."""
    x = (x ^ _shift_right(x, 30)) * _MIX[0]
    x = (x ^ _shift_right(x, 27)) * _MIX[1]
    return x ^ _shift_right(x, 31)
