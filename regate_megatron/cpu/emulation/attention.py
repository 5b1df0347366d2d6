"""Core attention for what Megatron's local one refuses: context parallelism and packed rows.

Slow and plain: keys and values of all context ranks are gathered, a mask says which query sees which key. Everything
else stays with Megatron's own ``DotProductAttention``.

Shapes: q queries and k keys (k over all context ranks), b rows, n heads of this rank, d head size; packed: b is 1.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.decoder.cutting import places


def install() -> None:
    """Patch ``DotProductAttention.__init__`` and ``forward``."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original_init, original_forward = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(original_init)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the refusal we lift
        original_init(self, alone, *args, **kwargs)
        self.config = config

    @functools.wraps(original_forward)
    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any):
        packed_seq_params = kw.pop("packed_seq_params", None)
        if self.config.context_parallel_size == 1 and packed_seq_params is None:
            return original_forward(self, query, key, value, attention_mask, *args, **kw)
        mask_type = args[0] if args else kw.get("attn_mask_type")
        return _attend(self, query, key, value, attention_mask, mask_type or self.attn_mask_type, packed_seq_params)

    DotProductAttention.__init__, DotProductAttention.forward = init, forward


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: Any, params: Any
) -> Tensor:
    from megatron.core import tensor_parallel
    from megatron.core.parallel_state import get_context_parallel_group

    group = get_context_parallel_group() if layer.config.context_parallel_size > 1 else None
    is_thd = params is not None and params.qkv_format == "thd"
    if is_thd:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    hidden_bqk = _hidden(len(query), query.shape[1], mask, mask_type, params, group)
    key, value = (_gather(x, group) for x in (key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    scores_bnqk = torch.einsum("qbnd,kbnd->bnqk", query, key) * layer.softmax_scale
    scores_bnqk = scores_bnqk.float().masked_fill(hidden_bqk[:, None], -torch.inf)
    share_bnqk = scores_bnqk.softmax(dim=-1).to(value.dtype)
    if layer.config.sequence_parallel:
        share_bnqk = layer.attention_dropout(share_bnqk)
    else:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            share_bnqk = layer.attention_dropout(share_bnqk)
    context = torch.einsum("bnqk,kbnd->qbnd", share_bnqk, value).flatten(2)
    return context.squeeze(1) if is_thd else context


def _hidden(num_queries: int, num_rows: int, mask: Tensor | None, mask_type: Any, params: Any, group: Any) -> Tensor:
    """Which keys a query must not see; bool [b or 1, q, k]. A query always sees itself.

    A mask is cut as Megatron cuts it: this rank's queries, every key, [b or 1, 1, q, k].
    """
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    total = num_queries * size
    is_thd = params is not None and params.qkv_format == "thd"
    real_N = None if params is None else params.cu_seqlens_q.diff().long()
    segment_N = torch.tensor([total])
    if is_thd:
        padded = params.cu_seqlens_q_padded if params.cu_seqlens_q_padded is not None else params.cu_seqlens_q
        segment_N = padded.diff().long()
    cut = places(segment_N, cp_size=size)
    key_k = torch.cat([cut.positions_of(other) for other in range(size)])
    query_q = cut.positions_of(rank)
    segment_L = torch.arange(len(segment_N)).repeat_interleave(segment_N)
    place_L = torch.arange(total) - (segment_N.cumsum(0) - segment_N)[segment_L]
    hidden_qk = segment_L[query_q][:, None] != segment_L[key_k][None, :]
    if "causal" in mask_type.name:
        hidden_qk = hidden_qk | (query_q[:, None] < key_k[None, :])
    hidden_bqk = hidden_qk[None]
    if mask is not None:
        hidden_bqk = hidden_bqk | mask[:, 0][:, :, key_k]
    if is_thd:
        hidden_bqk = hidden_bqk | (place_L[key_k] >= real_N[segment_L[key_k]])
    elif real_N is not None and len(real_N) == num_rows:
        hidden_bqk = hidden_bqk | (key_k >= real_N[:, None])[:, None, :]
    return hidden_bqk & (query_q[:, None] != key_k[None, :])


def partitioned_indices(cu_seqlens_padded: Tensor, total: int, cp_size: int, cp_rank: int) -> Tensor:
    """The positions of a packed row that a context rank holds: Transformer Engine's function of that name."""
    return places(cu_seqlens_padded.diff().long(), cp_size=cp_size).positions_of(cp_rank)


class _Gather(torch.autograd.Function):
    """Concatenate over a group; every rank reads the whole, so gradients are summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _gather(own: Tensor, group: Any) -> Tensor:
    return own if group is None else _Gather.apply(own, group)
