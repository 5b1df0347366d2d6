"""A core attention of the shape that Megatron-Bridge's Ministral 3 has, where Bridge is not installed.

What is real is Megatron's attention and how it is called; the scale is another one, of the same form.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention


class ScaledByPlace(DotProductAttention):
    """Queries grow with their place in the row, counted from 0 in whatever row comes."""

    beta, max_position_embeddings = 0.3, 5

    @staticmethod
    def _get_llama_4_attn_scale(place, beta, original_maximum, query_shape):
        scale = 1 + beta * torch.log(1 + torch.floor(place / original_maximum))
        return scale.view(*scale.shape, *[1] * (len(query_shape) - 1))

    def forward(self, query, *args, **kwargs):
        """That of the kernel, of scaled queries."""
        place = torch.arange(len(query))
        scale = self._get_llama_4_attn_scale(place, self.beta, self.max_position_embeddings, query.shape)
        return super().forward(query * scale, *args, **kwargs)


# It stands in the place of Bridge's class, which is known by this name.
ScaledByPlace.__module__ = "megatron.bridge.models.ministral3.ministral3_provider"
ScaledByPlace.__qualname__ = "MinistralTEDotProductAttention"
