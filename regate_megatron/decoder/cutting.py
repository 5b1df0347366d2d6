"""Where positions lie when a sequence is cut over ranks, and who sends what when it gets shorter. No Megatron.

Context parallelism (CP) cuts every segment into 2·CP chunks and gives rank r the chunks r and 2·CP−1−r, so that causal
work is even. Sequence parallelism (SP) cuts what a context rank has into TP slices. A row is one segment; a packed row
is several, each cut by itself. Ranks are numbered as in Megatron's tensor-and-context group: ``cp·TP + tp``.

Keeping positions moves them: the short sequence is cut again, evenly. :func:`route` says which local entries go where;
only kept positions travel, each once.

Shapes: L positions of a sequence, B rows, K kept slots, X entries a rank sends or receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where each position of a sequence lies.

    Attributes:
        rank_L: the rank that holds it; int64 [L].
        index_L: its index in what that rank holds; int64 [L].
        local_length: how many positions each rank holds.
    """

    rank_L: Tensor
    index_L: Tensor
    local_length: int

    @cached_property
    def order_L(self) -> Tensor:
        """All positions by rank, and in each rank's order; int64 [L]."""
        place_L = self.rank_L * self.local_length + self.index_L
        return torch.empty_like(place_L).scatter_(0, place_L, torch.arange(len(place_L)))

    def positions_of(self, rank: int) -> Tensor:
        """The positions a rank holds, in its order; int64 [local_length]."""
        return self.order_L[rank * self.local_length : (rank + 1) * self.local_length]


def places(segment_length_N: Tensor | Sequence[int], *, cp_size: int, tp_size: int = 1) -> Places:
    """Cut segments that lie one after the other over ``cp_size`` context and ``tp_size`` sequence-parallel ranks.

    Args:
        segment_length_N: their lengths, [N]; multiples of 2·CP under context parallelism, and their sum of CP·TP.

    Raises:
        ValueError: a length does not divide.
    """
    if torch.is_tensor(segment_length_N):
        segment_length_N = segment_length_N.tolist()
    return _places(tuple(segment_length_N), cp_size, tp_size)


@lru_cache(maxsize=32)
def _places(segment_lengths: tuple[int, ...], cp_size: int, tp_size: int) -> Places:
    """The same, remembered: rows have few lengths, and every microbatch asks. Nobody writes into what it returns."""
    segment_length_N = torch.tensor(segment_lengths, dtype=torch.int64)
    total = int(segment_length_N.sum())
    if total % (cp_size * tp_size) or (cp_size > 1 and bool((segment_length_N % (2 * cp_size)).any())):
        raise ValueError(f"segments of {list(segment_lengths)} positions do not divide over CP{cp_size} x TP{tp_size}")
    position_L = torch.arange(total)
    if cp_size == 1:
        cp_L, index_L = torch.zeros_like(position_L), position_L
    else:
        length_L = segment_length_N.repeat_interleave(segment_length_N)
        start_L = (segment_length_N.cumsum(0) - segment_length_N).repeat_interleave(segment_length_N)
        chunk_L = length_L // (2 * cp_size)
        number_L = (position_L - start_L) // chunk_L
        is_late_L = number_L >= cp_size
        cp_L = torch.where(is_late_L, 2 * cp_size - 1 - number_L, number_L)
        index_L = start_L // cp_size + (position_L - start_L) % chunk_L + torch.where(is_late_L, chunk_L, 0)
    local = total // (cp_size * tp_size)
    return Places(cp_L * tp_size + index_L // local, index_L % local, local)


@dataclass(frozen=True)
class Route:
    """One rank's part in going from a dense sequence to a short one; entries are ``index·B + row``, int64 on the host.

    Attributes:
        send_index_X: dense entries it sends, in the order of their receivers.
        receive_index_X: short entries it receives, in the order of their senders.
        send_counts, receive_counts: how many go to and come from each rank.
        dense_size, short_size: entries it holds before and after.
    """

    send_index_X: Tensor
    receive_index_X: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    dense_size: int
    short_size: int


def route_alone(keep_idx_BK: Tensor, dense_length: int) -> Route:
    """:func:`route` of a rank that holds all positions of the sequence."""
    num_rows, count = len(keep_idx_BK), keep_idx_BK.numel()
    if num_rows == 1:
        entries_X = keep_idx_BK[0]
    else:
        entries_KB = keep_idx_BK.numpy().T * num_rows + np.arange(num_rows)
        entries_X = torch.from_numpy(entries_KB.reshape(-1))
    return Route(entries_X, torch.arange(count), [count], [count], dense_length * num_rows, count)


def route(keep_idx_BK: Tensor, dense: Places, short: Places, *, rank: int, num_ranks: int) -> Route:
    """Who sends what when the positions ``keep_idx_BK`` of a dense sequence become the slots of a short one."""
    if num_ranks == 1:
        return route_alone(keep_idx_BK, dense.local_length)
    num_rows = len(keep_idx_BK)
    sizes = {"dense_size": dense.local_length * num_rows, "short_size": short.local_length * num_rows}
    row_1B, keep_KB = np.arange(num_rows)[None, :], keep_idx_BK.numpy().T
    # Between any two ranks both sides order entries by their slot at the receiver: going through the slots by receiver
    # and place there leaves nothing to sort but who sends to this rank.
    keep_KB = keep_KB[short.order_L.numpy()]
    source_KB, from_KB = dense.rank_L.numpy()[keep_KB], dense.index_L.numpy()[keep_KB] * num_rows + row_1B
    sent_KB = source_KB == rank
    source_Y = source_KB[rank * short.local_length : (rank + 1) * short.local_length].reshape(-1)
    return Route(
        send_index_X=torch.from_numpy(from_KB[sent_KB]),
        receive_index_X=torch.from_numpy(source_Y.astype(np.int16).argsort(kind="stable")),
        send_counts=np.count_nonzero(sent_KB.reshape(num_ranks, -1), axis=1).tolist(),
        receive_counts=np.bincount(source_Y, minlength=num_ranks).tolist(),
        **sizes,
    )
