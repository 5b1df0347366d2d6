"""Core attention that scales queries by their place in the row, as Ministral 3 does past its original maximum.

It counts places from 0 in whatever row it gets; in a short run it would count kept positions. There queries come with
what is missing, the scale of their own place over that of their slot, and the core attention does the rest.

The factor is one more column of the rotary table, so that recompute saves it like any other argument; two instance
attributes of the attention, ``forward`` and ``get_query_key_value_tensors``, bring it to the queries within a single
call. Both are the framework's where the table has no such column. (Rotation and scale commute.)

Shapes: K slots that run, B rows, D rotary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate_megatron.compat import is_one_of
from regate_megatron.decoder.exchange import ShardedPlan

SCALED = ("megatron.bridge.models.ministral3.ministral3_provider.MinistralTEDotProductAttention",)


class QueryScale:
    """The queries of one attention whose core attention is :data:`SCALED`."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.core = attention, attention.core_attention
        self._attend, self._make = attention.forward, attention.get_query_key_value_tensors
        self._factor_KB11: Tensor | None = None
        attention.forward, attention.get_query_key_value_tensors = self.attend, self.make

    def detach(self) -> None:
        """Give the attention its own methods back."""
        del self.attention.forward, self.attention.get_query_key_value_tensors

    def widened(self, table_KB1D: Tensor, plan: ShardedPlan) -> Tensor:
        """The rotary table with the factors as its last column, [K, B, 1, D + 1]; as it is where all of them are 1."""
        if plan.dense_length <= self.core.max_position_embeddings:
            return table_KB1D
        slot_K1 = torch.arange(plan.keep_idx_BK.shape[1], device=table_KB1D.device)[:, None]
        factor_KB = self._scale(plan.keep_idx_BK.t()) / self._scale(slot_K1)
        return torch.cat([table_KB1D, factor_KB[:, :, None, None].to(table_KB1D.dtype)], dim=-1)

    def attend(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """The attention's forward; a rotary table of odd width has a factor at its end."""
        if rotary_pos_emb is not None and torch.is_tensor(rotary_pos_emb) and rotary_pos_emb.shape[-1] % 2:
            self._factor_KB11 = rotary_pos_emb[..., -1:]
            rotary_pos_emb = rotary_pos_emb[..., :-1].contiguous()  # fused kernels read it as one block
        try:
            return self._attend(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        finally:
            self._factor_KB11 = None

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's queries, keys and values."""
        query_KBx, *rest = self._make(*args, **kwargs)
        if self._factor_KB11 is not None:
            query_KBx = query_KBx * self._factor_KB11.to(query_KBx.dtype)
        return query_KBx, *rest

    def _scale(self, place: Tensor) -> Tensor:
        """As the core attention has it, of places."""
        return self.core._get_llama_4_attn_scale(place, self.core.beta, self.core.max_position_embeddings, (1,))


def scales_queries(attention: Any) -> bool:
    """Whether an attention's core attention is one of :data:`SCALED`."""
    return is_one_of(getattr(attention, "core_attention", None), SCALED)
