"""The plan of one training step: which positions every microbatch runs, as a value that every rank of a replica shares.

Shapes: B rows of a microbatch, S dense positions, K positions that run, N segments of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch import Tensor

from regate_megatron.method import masks

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
    def of(cls, kept_BS: Tensor, slots: int | Packing) -> MicrobatchPlan:
        """The plan that keeps the marked positions.

        Args:
            slots: of each row; or how one packed row is laid out, each segment in its own slots.

        Raises:
            ValueError: a row, or a segment, keeps more.
        """
        return plan_each([kept_BS], [slots])[0]

    @property
    def length(self) -> int:
        """K, the positions each row runs after the dense layers."""
        return self.dense_length if self.keep_idx_BK is None else self.keep_idx_BK.shape[1]

    @cached_property
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


def plan_each(kept: Sequence[Tensor], slots: Sequence[int | Packing]) -> list[MicrobatchPlan]:
    """The plans that keep the marked positions of microbatches, put together in one go.

    Args:
        kept: bool [B, S] of each microbatch.
        slots: of each, how many its rows have; or those of the segments of its one packed row.

    Raises:
        ValueError: a row or a segment keeps more.
    """
    dense, length, origin, end = [], [], [], 0  # of rows and of segments, all one after the other
    counts, sizes, packings = [], [], []  # of each microbatch: rows or segments, slots, how it is packed
    for kept_BS, slot in zip(kept, slots, strict=True):
        rows, dense_length = kept_BS.shape
        packings.append(slot if isinstance(slot, Packing) else None)
        if packings[-1]:
            own = slot.length_N.tolist()
            dense += slot.dense_length_N.tolist()
            origin += [end] * len(own)
        else:
            own = [slot] * rows
            dense += [dense_length] * rows
            origin += range(end, end + kept_BS.numel(), dense_length)
        length += own
        counts.append(len(own))
        sizes.append(sum(own))
        end += kept_BS.numel()
    dense_Y, length_Y, origin_Y = (np.array(values, np.int64) for values in (dense, length, origin))
    position_X = np.concatenate([kept_BS.numpy().reshape(-1) for kept_BS in kept]).nonzero()[0]
    end_Y = dense_Y.cumsum()
    before_Y = position_X.searchsorted(end_Y - dense_Y)  # kept positions of earlier rows and segments
    num_kept_Y = np.diff(before_Y, append=len(position_X))
    if (num_kept_Y > length_Y).any():
        raise ValueError(f"rows keep {num_kept_Y.tolist()} positions, more than {length_Y.tolist()} slots")
    keep_idx_K = np.repeat(end_Y - dense_Y - origin_Y, length_Y)
    slot_X = np.arange(len(position_X)) + np.repeat(length_Y.cumsum() - length_Y - before_Y, num_kept_Y)
    keep_idx_K[slot_X] = position_X - np.repeat(origin_Y, num_kept_Y)
    is_kept_K = np.zeros(len(keep_idx_K), bool)
    is_kept_K[slot_X] = True
    parts = (
        torch.from_numpy(values).split(each)
        for values, each in ((keep_idx_K, sizes), (is_kept_K, sizes), (num_kept_Y, counts))
    )
    plans = []
    for kept_BS, packing, keep_idx_X, is_kept_X, num_kept_N in zip(kept, packings, *parts, strict=True):
        rows, dense_length = kept_BS.shape
        plan = MicrobatchPlan(dense_length, keep_idx_X.view(rows, -1), is_kept_X.view(rows, -1), packing)
        vars(plan).update(_kept_BS=kept_BS, num_kept_N=num_kept_N)  # neither is worked out from the slots again
        plans.append(plan)
    return plans


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step: one :class:`MicrobatchPlan` per microbatch, in order; empty for a dense step."""

    step: int
    microbatches: tuple[MicrobatchPlan, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Whether this step elides anything."""
        return bool(self.microbatches)

    @cached_property
    def kept_P(self) -> Tensor:
        """Kept dense positions of all microbatches, one after the other; bool [P]."""
        return torch.cat([one.kept_mask().reshape(-1) for one in self.microbatches])

    def digest(self) -> str:
        """A 128-bit hash of everything in the plan, in hex."""
        digest = xxhash.xxh3_128(np.array([self.step, len(self.microbatches)]).tobytes())
        shapes = [(*one.keep_idx_BK.shape, one.dense_length) for one in self.microbatches]
        for one, shape_3 in zip(self.microbatches, np.array(shapes, np.int64), strict=True):
            digest.update(shape_3)
            packing = [one.packing.dense_length_N, one.packing.length_N] if one.packing else []
            for values in (one.keep_idx_BK, one.is_kept_BK, *packing):
                digest.update(np.ascontiguousarray(values.numpy()))
        return digest.hexdigest()

    def pack(self) -> Tensor:
        """The plan as one int64 vector: what each microbatch's shape is, then a bit per dense position of the step.

        Slots follow from the lengths.
        """
        packings = [one.packing for one in self.microbatches]
        headers = [
            [len(one.keep_idx_BK), one.dense_length, one.length, len(packing.length_N) if packing else 0]
            for one, packing in zip(self.microbatches, packings, strict=True)
        ]
        segments = [part.numpy() for one in packings if one for part in (one.dense_length_N, one.length_N)]
        kept = [one.kept_mask().numpy().reshape(-1) for one in self.microbatches]
        bits = np.packbits(np.concatenate(kept)).tobytes() if kept else b""
        words = np.frombuffer(bits + bytes(-len(bits) % 8), np.int64)
        start = np.array([self.step, len(headers)])
        return torch.from_numpy(np.concatenate([start, np.array(headers, np.int64).reshape(-1), *segments, words]))

    @classmethod
    def unpack(cls, flat: Tensor) -> StepPlan:
        """The inverse of :meth:`pack`."""
        step, count = flat[:2].tolist()
        at = 2 + _HEADER * count
        headers, slots = flat[2:at].view(count, _HEADER).tolist(), []
        for _, _, length, segments in headers:
            slots.append(Packing(*flat[at : at + 2 * segments].view(2, -1)) if segments else length)
            at += 2 * segments
        if not headers:
            return cls(step)
        sizes = [rows * dense_length for rows, dense_length, *_ in headers]
        kept = np.unpackbits(flat[at:].numpy().view(np.uint8), count=sum(sizes)).view(bool)
        parts = zip(torch.from_numpy(kept).split(sizes), headers, strict=True)
        return cls(step, tuple(plan_each([kept_X.view(rows, -1) for kept_X, (rows, *_) in parts], slots)))
