"""Difficulty and reference loss to the score that ranks target tokens. Torch only.

Shapes: R rows, S positions of the merged sequence. Losses are negative log-likelihoods in nats.
"""

import torch
from torch import Tensor

_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # splitmix64, as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def fuse(
    difficulty_RS: Tensor, reference_RS: Tensor | None, *, score: str, fusion: str, reference_weight: float
) -> Tensor:
    """The score of every position, float64 [R, S]; larger is kept first. Paper: ``d = m + λ·ℓref``.

    Args:
        difficulty_RS: m, the running average of the student's loss, float [R, S].
        reference_RS: ℓref, the frozen teacher's loss, float [R, S]; None where ``score`` is "student".
        score: "regate" (fused), "student" (m), "reference" (ℓref) or "excess" (m − ℓref, as Rho-1).
        fusion: "sum" (the printed formula) or "convex" ((1−λ)·m + λ·ℓref, which fits the paper's ablation better).
        reference_weight: λ.
    """
    difficulty_RS = difficulty_RS.double()
    if score == "student":
        return difficulty_RS
    reference_RS = reference_RS.double()
    if score == "reference":
        return reference_RS
    if score == "excess":
        return difficulty_RS - reference_RS
    student_weight = 1.0 if fusion == "sum" else 1.0 - reference_weight
    return student_weight * difficulty_RS + reference_weight * reference_RS


def random_score(key_R2: Tensor, num_positions: int, *, seed: int, step: int) -> Tensor:
    """A score in [0, 1) that depends on (seed, step, content key, position) alone; float64 [R, S].

    Args:
        key_R2: 128-bit content keys as int64 [R, 2]; the same sample scores the same on any rank and in any layout.
        num_positions: S.
    """
    state_R1 = _mix(_mix(key_R2[:, :1] ^ _mix(torch.tensor(seed) + _GOLDEN)) ^ key_R2[:, 1:])
    state_R1 = _mix(state_R1 + _GOLDEN * torch.tensor(step + 1))
    state_RS = _mix(state_R1 + _GOLDEN * torch.arange(1, num_positions + 1, dtype=torch.int64))
    return _shift_right(state_RS, 11).double() / float(1 << 53)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the mask makes them logical


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (arithmetic wraps)."""
    x = (x ^ _shift_right(x, 30)) * _MIX[0]
    x = (x ^ _shift_right(x, 27)) * _MIX[1]
    return x ^ _shift_right(x, 31)
