"""What one rank needs of a plan: its part of every exchange, positions and lengths, on its device.

Made for all microbatches before the schedule starts, from the plan on the host, so that nothing inside the schedule
waits for the device. Kept hidden states travel once per microbatch, in one all-to-all over the ranks that share the
sequence; per-token losses travel back the same way. On one rank an exchange is an index.

Shapes: B rows, S dense positions, K slots, k slots of this context rank, L local entries (l short ones), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.decoder.cutting import Route, places, route, route_alone
from regate_megatron.method.plan import MicrobatchPlan


@dataclass(frozen=True)
class Layout:
    """This rank's place among those that share a sequence.

    Attributes:
        cp_size, cp_rank: context parallelism.
        sp_size, sp_rank: sequence parallelism; 1 and 0 where hidden states are not cut over the tensor group.
        hidden_group: the ranks that share hidden states; None when each holds the whole sequence.
        context_group: the ranks that share labels and losses; None without context parallelism.
    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0
    hidden_group: Any = None
    context_group: Any = None

    @classmethod
    def of_model(cls, config: Any, *, sequence_parallel: bool) -> Layout:
        """From Megatron's parallel state; ``config`` is the language model's."""
        from megatron.core import parallel_state as mpu

        tp_size = mpu.get_tensor_model_parallel_world_size()
        sp_size = tp_size if sequence_parallel else 1
        cp_size = config.context_parallel_size
        groups = {
            (False, True): mpu.get_tensor_model_parallel_group,
            (True, False): mpu.get_context_parallel_group,
            (True, True): mpu.get_tensor_and_context_parallel_group,
        }
        make = groups.get((cp_size > 1, sp_size > 1))
        layout = cls(
            cp_size=cp_size,
            cp_rank=mpu.get_context_parallel_rank() if cp_size > 1 else 0,
            sp_size=sp_size,
            sp_rank=mpu.get_tensor_model_parallel_rank() if sp_size > 1 else 0,
            hidden_group=make() if make else None,
            context_group=mpu.get_context_parallel_group() if cp_size > 1 else None,
        )
        if make:
            assert dist.get_rank(make()) == layout.rank, "Megatron numbers this group in another order"
        return layout

    @property
    def rank(self) -> int:
        """This rank in :attr:`hidden_group`."""
        return self.cp_rank * self.sp_size + self.sp_rank


class Exchange:
    """Moves entries between the dense sequence and the short one, with gradients; every rank of the group calls it."""

    def __init__(self, moves: Route, group: Any) -> None:
        self._moves, self._group = moves, group
        self._send_index_X = moves.send_index_X
        self._receive_index_X = self._receive_order_X = None  # on one rank entries arrive in their order
        if group is not None:
            self._receive_index_X = moves.receive_index_X
            self._receive_order_X = _inverse(moves.receive_index_X)

    @property
    def indices(self) -> tuple[Tensor | None, ...]:
        """What :meth:`move` brings to the device."""
        return self._send_index_X, self._receive_index_X, self._receive_order_X

    def move(self, indices: Sequence[Tensor | None]) -> None:
        """Take these, which lie on the device, for :attr:`indices`."""
        self._send_index_X, self._receive_index_X, self._receive_order_X = indices

    def to_short(self, dense_LBx: Tensor) -> Tensor:
        """Kept entries at their slots; [L, B, …] to [L', B, …]."""
        rows = dense_LBx.shape[1]
        flat = _Move.apply(dense_LBx.reshape(-1, *dense_LBx.shape[2:]), self, False)
        return flat.view(-1, rows, *dense_LBx.shape[2:])

    def to_dense(self, short_LBx: Tensor) -> Tensor:
        """Entries of slots added up at their positions, zeros elsewhere; [L', B, …] to [L, B, …]."""
        rows = short_LBx.shape[1]
        flat = _Move.apply(short_LBx.reshape(-1, *short_LBx.shape[2:]), self, True)
        return flat.view(-1, rows, *short_LBx.shape[2:])

    def gather(self, dense_Xx: Tensor) -> Tensor:
        """Dense entries to short ones."""
        sent = dense_Xx.index_select(0, self._send_index_X)
        if self._group is None:
            return sent
        received = self._all_to_all(sent, self._moves.send_counts, self._moves.receive_counts)
        return received.index_select(0, self._receive_order_X)

    def scatter(self, short_Xx: Tensor) -> Tensor:
        """Short entries to dense ones: the transpose of :meth:`gather`."""
        received = short_Xx
        if self._group is not None:
            sent = short_Xx.index_select(0, self._receive_index_X)
            received = self._all_to_all(sent, self._moves.receive_counts, self._moves.send_counts)
        dense_Xx = short_Xx.new_zeros(self._moves.dense_size, *short_Xx.shape[1:])
        return dense_Xx.index_add_(0, self._send_index_X, received)

    def _all_to_all(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        received = sent.new_empty(sum(receive_counts), *sent.shape[1:])
        dist.all_to_all_single(received, sent, receive_counts, send_counts, group=self._group)
        return received


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries_Xx: Tensor, exchange: Exchange, to_dense: bool) -> Tensor:
        ctx.exchange, ctx.to_dense = exchange, to_dense
        return exchange.scatter(entries_Xx) if to_dense else exchange.gather(entries_Xx)

    @staticmethod
    def backward(ctx: Any, gradient_Xx: Tensor) -> tuple[Tensor, None, None]:
        exchange = ctx.exchange
        return exchange.gather(gradient_Xx) if ctx.to_dense else exchange.scatter(gradient_Xx), None, None


@dataclass(frozen=True)
class ShardedPlan:
    """A microbatch's plan on one rank.

    Attributes:
        dense_length: S, before any cut.
        local_length: positions of hidden states this rank holds dense.
        keep_idx_BK: as in :class:`MicrobatchPlan`, on the device.
        place_Bk: for the rotary embedding, dense position of each slot of this context rank; in a packed row the place
            of every slot in its segment, [1, K] (Megatron cuts those itself).
        is_fill_Bk: slots of this context rank that are fill.
        hidden: exchange of hidden states, on ranks that compact.
        tokens: exchange of labels and losses on ranks that compute the loss, and of rotary tables and masks of padding
            that batches bring.
        cu_seqlens, cu_seqlens_padded: int32 [N+1] of real slots and of slots, per row or segment.
        max_length: the longest row or segment, slots.
        is_packed: whether the row holds several segments.
        cp_size: context-parallel ranks.
        is_kept_LB: which dense positions of hidden states on this rank are kept, where they come back.
        is_fill_lB: which of its short ones are fill (l under context and sequence parallelism), where they come back.
        loss_mask_BS: the batch's own, before elision, where the model predicts ahead.
    """

    dense_length: int
    local_length: int
    keep_idx_BK: Tensor
    place_Bk: Tensor
    is_fill_Bk: Tensor
    hidden: Exchange | None
    tokens: Exchange | None
    cu_seqlens: Tensor
    cu_seqlens_padded: Tensor
    max_length: int
    is_packed: bool
    cp_size: int
    is_kept_LB: Tensor | None = None
    is_fill_lB: Tensor | None = None
    loss_mask_BS: Tensor | None = None

    def put_back(self, dense_LBH: Tensor, short_lBH: Tensor) -> Tensor:
        """Hidden states of the dense sequence: ``short_lBH`` where positions were kept, ``dense_LBH`` elsewhere.

        Every rank that shares hidden states calls this, over :attr:`Layout.hidden_group`; [L, B, H].
        """
        back_LBH = self.hidden.to_dense(short_lBH.masked_fill(self.is_fill_lB[..., None], 0))
        return back_LBH + dense_LBH.masked_fill(self.is_kept_LB[..., None], 0)


def shard_plans(
    plans: Sequence[MicrobatchPlan],
    layout: Layout,
    device: torch.device,
    *,
    moves_hidden: bool,
    moves_tokens: bool,
    comes_back: bool = False,
) -> list[ShardedPlan]:
    """This rank's part of every microbatch's plan, on its device in one copy; no communication.

    Args:
        moves_hidden: whether this rank's chunk compacts.
        moves_tokens: whether this rank's chunk computes the loss, or gets its rotary table, or on context ranks a mask
            of padding, with every batch.
        comes_back: whether the chunk's last layers run at full length again; with ``moves_hidden``.
    """
    moves = {"moves_hidden": moves_hidden, "moves_tokens": moves_tokens, "comes_back": comes_back}
    shards = [_shard(plan, layout, *ends, **moves) for plan, ends in zip(plans, _cumulative(plans), strict=True)]
    return shards if device.type == "cpu" else _on_device(shards, device)


def _cumulative(plans: Sequence[MicrobatchPlan]) -> list[tuple[Tensor, Tensor]]:
    """Where real slots, and slots, of each row or segment start, and the last ones end; int32 [N+1] each."""
    if not plans:
        return []
    num_kept, ends, sizes = torch.cat([one.num_kept_N for one in plans]).tolist(), [], []
    first = 0
    for one in plans:
        count = len(one.num_kept_N)
        lengths = [one.length] * count if one.packing is None else one.packing.length_N.tolist()
        ends += [0, *accumulate(num_kept[first : first + count]), 0, *accumulate(lengths)]
        sizes += [count + 1] * 2
        first += count
    parts = torch.from_numpy(np.array(ends, np.int32)).split(sizes)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _shard(
    plan: MicrobatchPlan,
    layout: Layout,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor,
    *,
    moves_hidden: bool,
    moves_tokens: bool,
    comes_back: bool,
) -> ShardedPlan:
    """One microbatch's part, on the host."""
    packing = plan.packing
    dense = packing.dense_length_N.tolist() if packing else [plan.dense_length]
    short = packing.length_N.tolist() if packing else [plan.length]
    place_Bk, is_fill_BK = plan.keep_idx_BK, ~plan.is_kept_BK
    if packing:
        start_N = packing.dense_length_N.cumsum(0) - packing.dense_length_N
        place_Bk = place_Bk - start_N.repeat_interleave(packing.length_N)
    is_fill_Bk = is_fill_BK
    if layout.cp_size > 1:
        context_slots_k = places(short, cp_size=layout.cp_size).positions_of(layout.cp_rank)
        place_Bk = place_Bk if packing else place_Bk[:, context_slots_k]
        is_fill_Bk = is_fill_BK[:, context_slots_k]
    hidden = tokens = None
    if moves_hidden:
        hidden = _exchange(plan, dense, short, layout, over_tensor_group=True)
    if moves_tokens:
        is_same = hidden is not None and layout.sp_size == 1
        tokens = hidden if is_same else _exchange(plan, dense, short, layout, over_tensor_group=False)
    is_kept_LB = is_fill_lB = None
    if comes_back:
        sizes = {"cp_size": layout.cp_size, "tp_size": layout.sp_size}
        is_kept_LB = plan.kept_mask().t()[places(dense, **sizes).positions_of(layout.rank)]
        is_fill_lB = is_fill_BK.t()[places(short, **sizes).positions_of(layout.rank)]
    return ShardedPlan(
        dense_length=plan.dense_length,
        local_length=plan.dense_length // (layout.cp_size * layout.sp_size),
        keep_idx_BK=plan.keep_idx_BK,
        place_Bk=place_Bk,
        is_fill_Bk=is_fill_Bk,
        hidden=hidden,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        cu_seqlens_padded=cu_seqlens_padded,
        max_length=max(short),
        is_packed=packing is not None,
        cp_size=layout.cp_size,
        is_kept_LB=is_kept_LB,
        is_fill_lB=is_fill_lB,
    )


def _exchange(
    plan: MicrobatchPlan, dense: Sequence[int], short: Sequence[int], layout: Layout, *, over_tensor_group: bool
) -> Exchange:
    sp_size = layout.sp_size if over_tensor_group else 1
    rank = layout.rank if over_tensor_group else layout.cp_rank
    group = layout.hidden_group if over_tensor_group else layout.context_group
    if group is None:
        return Exchange(route_alone(plan.keep_idx_BK, plan.dense_length), None)
    sizes = {"cp_size": layout.cp_size, "tp_size": sp_size}
    cuts = places(dense, **sizes), places(short, **sizes)
    return Exchange(route(plan.keep_idx_BK, *cuts, rank=rank, num_ranks=layout.cp_size * sp_size), group)


def _inverse(order_X: Tensor) -> Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X)))


_ON_DEVICE = ("keep_idx_BK", "place_Bk", "is_fill_Bk", "cu_seqlens", "cu_seqlens_padded", "is_kept_LB", "is_fill_lB")


def _on_device(shards: Sequence[ShardedPlan], device: torch.device) -> list[ShardedPlan]:
    """The same on ``device``, to which all of it goes in one copy that nobody waits for."""
    own = [[getattr(one, name) for name in _ON_DEVICE] for one in shards]
    exchanges = list({id(each): each for one in shards for each in (one.hidden, one.tokens) if each}.values())
    indices = [each.indices for each in exchanges]
    moved = iter(_copy([value for values in (*own, *indices) for value in values], device))
    fields = [{name: next(moved) for name in _ON_DEVICE} for _ in shards]
    for each, values in zip(exchanges, indices, strict=True):
        each.move([next(moved) for _ in values])
    return [replace(one, **values) for one, values in zip(shards, fields, strict=True)]


def _copy(values: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Host tensors on ``device``: bytes laid one after the other in a pinned buffer, and views of its copy."""
    places: dict[int, tuple[int, Tensor]] = {}  # what several fields share goes once
    end = 0
    for value in values:
        if value is not None and id(value) not in places:
            places[id(value)] = end, value
            end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=device.type != "cpu")
    bytes_X = pinned.numpy()
    for start, value in places.values():
        bytes_X[start : start + value.nbytes] = value.contiguous().numpy().reshape(-1).view(np.uint8)
    there_X = pinned.to(device, non_blocking=True)
    sent = {
        name: there_X[start : start + value.nbytes].view(value.dtype).view(value.shape)
        for name, (start, value) in places.items()
    }
    return [None if value is None else sent[id(value)] for value in values]


_ALIGNMENT = 16  # bytes; kernels may read so many at once
