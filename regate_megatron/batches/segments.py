"""The samples of a packed row of Megatron-Bridge: where each starts, and where its own positions end.

``cu_seqlens_q`` counts the samples' own positions, ``cu_seqlens_q_padded`` also those that each is filled up with;
without it there are none. Bridge's collators (``enable_in_batch_packing``) write both, its datasets of rows packed
offline (``enable_offline_packing``) one or both, with repeats at the end where another row holds more samples, and a
last segment for what fills the row: without positions of its own where both are written, else a sample without loss.

Shapes: S positions of the row, N samples, M positions of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import to_cpu


@dataclass(frozen=True)
class Segments:
    """A packed row.

    Attributes:
        sample_1S: the sample of each position; int64 [1, S].
        real_N: positions of each sample, without what fills it up; int64.
        says_padding: whether the batch says where samples are filled up.
    """

    sample_1S: Tensor
    real_N: Tensor
    says_padding: bool

    @classmethod
    def of(cls, batch: dict[str, Any], shape: tuple[int, ...]) -> Segments | None:
        """Those of a batch of rows of this shape [B, S]; None where it is not packed so.

        Raises:
            ValueError: the metadata do not fit the row.
        """
        if batch.get("cu_seqlens_q") is None:
            return None
        if shape[0] != 1:
            raise ValueError(f"cu_seqlens_q in a batch of {shape[0]} rows, not one")
        real_X = to_cpu(batch["cu_seqlens_q"]).long().flatten()
        given = batch.get("cu_seqlens_q_padded")
        padded_X = real_X if given is None else to_cpu(given).long().flatten()
        real_N, length_N = real_X.diff(), padded_X.diff()
        if len(real_N) != len(length_N) or bool((real_N < 0).any() or (real_N > length_N).any()):
            raise ValueError(f"cu_seqlens_q {real_X.tolist()} with cu_seqlens_q_padded {padded_X.tolist()}")
        return cls(samples_of(padded_X[None], shape[1]), real_N[length_N > 0], given is not None)

    @cached_property
    def length_N(self) -> Tensor:
        """Positions of each sample, with what fills it up; int64."""
        return torch.bincount(self.sample_1S[0])

    @cached_property
    def is_padding_1S(self) -> Tensor:
        """What fills samples up; bool."""
        start_N = self.length_N.cumsum(0) - self.length_N
        sample_S = self.sample_1S[0]
        return (torch.arange(len(sample_S)) - start_N[sample_S] >= self.real_N[sample_S])[None]

    def as_rows(self, value_1S: Tensor) -> Tensor:
        """Each sample in a row of its own, zeros behind it; [N, M].

        Raises:
            ValueError: a row would be empty, which no model gives places.
        """
        if bool((self.real_N == 0).any()):
            raise ValueError("cu_seqlens_q with a sample of no positions of its own")
        value_NM = value_1S.new_zeros(len(self.real_N), int(self.real_N.max()))
        value_NM[self.is_real_NM] = value_1S[~self.is_padding_1S]
        return value_NM

    def in_one_row(self, value_NMx: Tensor) -> Tensor:
        """The inverse of :meth:`as_rows`, zeros where a sample is filled up; [1, S, …]."""
        value_1Sx = value_NMx.new_zeros(*self.sample_1S.shape, *value_NMx.shape[2:])
        value_1Sx[~self.is_padding_1S] = value_NMx[self.is_real_NM]
        return value_1Sx

    @property
    def is_real_NM(self) -> Tensor:
        """Where :meth:`as_rows` holds a sample's own positions; bool [N, M]."""
        return torch.arange(int(self.real_N.max())) < self.real_N[:, None]


def samples_of(cu_seqlens_BX: Tensor, length: int) -> Tensor:
    """The sample of each position when B packed rows of ``length`` lie one after the other; int64 [1, B·S].

    Args:
        cu_seqlens_BX: where segments start, from 0 to ``length``; repeats of ``length`` at the end are fill.

    Raises:
        ValueError: a row's segments do not cover it.
    """
    if bool((cu_seqlens_BX[:, 0] != 0).any() or (cu_seqlens_BX.amax(dim=1) != length).any()):
        raise ValueError(f"cu_seqlens that do not run from 0 to {length}")
    length_BN = cu_seqlens_BX.diff(dim=1)
    length_N = length_BN[length_BN > 0]
    if int(length_N.sum()) != length * len(cu_seqlens_BX):
        raise ValueError("cu_seqlens that go back")
    return torch.arange(len(length_N)).repeat_interleave(length_N)[None]
