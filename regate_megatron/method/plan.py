"""The plan of one training step: which positions every microbatch runs, as a value that every rank of a replica shares.

Shapes: B rows of a microbatch, S dense positions, K positions that run, N segments of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor

from regate_megatron.method import masks
from regate_megatron.method.selection import pack_positions

_HEADER = 4  # per microbatch: B, S, K, N


@dataclass(frozen=True)
class Packing:
    """The segments of a packed row, one after the other.

    Attributes:
        dense_length_N: positions of each before anything is left out; int64 [N], their sum is S.
        length_N: slots of each in the short run, fill at its end included; int64 [N], their sum is K.
    """

    dense_length_N: Tensor
    length_N: Tensor


@dataclass(frozen=True)
class MicrobatchPlan:
    """What one microbatch runs.

    Attributes:
        dense_length: S.
        keep_idx_BK: dense positions that run, ascending; fill comes last (in a packed row: last in its segment) and
            repeats the first position of the row (the segment); int64 [B, K]. None: the dense step.
        is_kept_BK: which slots are real, not fill; bool [B, K]. None: the dense step.
        packing: the segments of a packed row (B is 1 then); None for rows of one sample.
    """

    dense_length: int
    keep_idx_BK: Tensor | None = None
    is_kept_BK: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def of(cls, kept_BS: Tensor, length: int) -> MicrobatchPlan:
        """The plan that keeps the marked positions in rows of ``length`` slots.

        Raises:
            ValueError: a row keeps more.
        """
        keep_idx_BK, num_kept_B = pack_positions(kept_BS, length)
        is_kept_BK = torch.from_numpy(np.arange(length) < num_kept_B.numpy()[:, None])
        return cls(kept_BS.shape[1], keep_idx_BK, is_kept_BK)._knowing(kept_BS)

    @classmethod
    def of_packed(cls, kept_1S: Tensor, packing: Packing) -> MicrobatchPlan:
        """The plan that keeps the marked positions of one packed row, each segment in its own slots.

        Raises:
            ValueError: a segment keeps more than its slots.
        """
        dense_N, length_N = packing.dense_length_N.numpy(), packing.length_N.numpy()
        position_X = kept_1S[0].numpy().nonzero()[0]
        end_N = dense_N.cumsum()
        before_N = position_X.searchsorted(end_N - dense_N)  # kept positions of earlier segments
        num_kept_N = position_X.searchsorted(end_N) - before_N
        if (num_kept_N > length_N).any():
            raise ValueError(f"segments keep {num_kept_N.tolist()} positions, more than {length_N.tolist()} slots")
        keep_idx_K = np.repeat(end_N - dense_N, length_N)
        first_slot_N = length_N.cumsum() - length_N
        slot_X = np.arange(len(position_X)) + np.repeat(first_slot_N - before_N, num_kept_N)
        keep_idx_K[slot_X] = position_X
        is_kept_K = np.zeros(len(keep_idx_K), bool)
        is_kept_K[slot_X] = True
        keep_idx_1K, is_kept_1K = torch.from_numpy(keep_idx_K)[None], torch.from_numpy(is_kept_K)[None]
        return cls(kept_1S.shape[1], keep_idx_1K, is_kept_1K, packing)._knowing(kept_1S)

    @property
    def length(self) -> int:
        """K, the positions each row runs after the dense layers."""
        return self.dense_length if self.keep_idx_BK is None else self.keep_idx_BK.shape[1]

    @property
    def num_kept_N(self) -> Tensor:
        """Real slots of each row, or of each segment of a packed row; int64 [N]."""
        if self.packing is None:
            return self.is_kept_BK.sum(dim=1)
        segment_K = torch.arange(len(self.packing.length_N)).repeat_interleave(self.packing.length_N)
        return torch.bincount(masks.take(segment_K, self.is_kept_BK[0]), minlength=len(self.packing.length_N))

    def kept_mask(self) -> Tensor:
        """Kept dense positions as a mask; bool [B, S]. Several ask for it in a step; nobody writes into it."""
        return self._kept_BS

    @cached_property
    def _kept_BS(self) -> Tensor:
        mask_BS = torch.zeros(len(self.keep_idx_BK), self.dense_length, dtype=torch.uint8)
        return mask_BS.scatter_add_(1, self.keep_idx_BK, self.is_kept_BK.byte()).bool()

    def _knowing(self, kept_BS: Tensor) -> MicrobatchPlan:
        """The same plan, with its mask remembered: it is not computed again from the slots."""
        vars(self)["_kept_BS"] = kept_BS
        return self


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step: one :class:`MicrobatchPlan` per microbatch, in order; empty for a dense step."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Whether this step elides anything."""
        return bool(self.microbatches)

    def digest(self) -> str:
        """A 128-bit hash of everything in the plan, in hex."""
        digest = xxhash.xxh3_128(np.array([self.step, len(self.microbatches)]).tobytes())
        for one in self.microbatches:
            digest.update(np.array([*one.keep_idx_BK.shape, one.dense_length]).tobytes())
            packing = [one.packing.dense_length_N, one.packing.length_N] if one.packing else []
            for values in (one.keep_idx_BK, one.is_kept_BK, *packing):
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def pack(self) -> Tensor:
        """The plan as one int64 vector: a bit per dense position, slots follow from the lengths."""
        parts = [np.array([self.step, len(self.microbatches)])]
        for one in self.microbatches:
            segments = [one.packing.dense_length_N.numpy(), one.packing.length_N.numpy()] if one.packing else []
            header = [len(one.keep_idx_BK), one.dense_length, one.length, len(segments[0]) if segments else 0]
            bits = np.packbits(one.kept_mask().numpy()).tobytes()
            words = np.frombuffer(bits + bytes(-len(bits) % 8), np.int64)
            parts += [np.array(header), *segments, words]
        return torch.from_numpy(np.concatenate(parts))

    @classmethod
    def unpack(cls, flat: Tensor) -> StepPlan:
        """The inverse of :meth:`pack`."""
        step, count = flat[:2].tolist()
        at, microbatches = 2, []

        def take(size: int) -> Tensor:
            nonlocal at
            at += size
            return flat[at - size : at]

        for _ in range(count):
            rows, dense_length, length, segments = take(_HEADER).tolist()
            packing = Packing(take(segments), take(segments)) if segments else None
            num_bits = rows * dense_length
            bits = take(-(-num_bits // 64)).numpy().view(np.uint8)
            kept = torch.from_numpy(np.unpackbits(bits, count=num_bits).view(bool)).view(rows, dense_length)
            one = MicrobatchPlan.of_packed(kept, packing) if packing else MicrobatchPlan.of(kept, length)
            microbatches.append(one)
        return cls(step, tuple(microbatches))
