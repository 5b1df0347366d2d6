"""Fused RoPE, off where its kernels would not take the positions that slots have.

The fused kernels take one row of frequencies for all rows of a microbatch, and in packed rows count the positions of
every segment anew. Slots of a short range have positions of their own in every row. Whether an attention fuses is read
from its config in every forward; so where rows are several, or packed, it gets a copy of it that says no for the whole
of a sparse step (recompute runs short layers again in backward). Dense steps fuse as ever, and so do the dense layers
of a sparse one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from regate_megatron.decoder.switches import Switch


def fusing(modules: Iterable[Any]) -> list[Any]:
    """The attentions among them whose config asks for fused RoPE."""
    from megatron.core.transformer.attention import Attention

    return [one for one in modules if isinstance(one, Attention) and one.config.apply_rope_fusion]


def unfused(attentions: Sequence[Any]) -> list[Switch]:
    """What gives them configs that ask for no fused RoPE; made anew for each step, as others write to configs."""
    plain = {id(one.config): one.config for one in attentions}
    plain = {key: _without_fusion(config) for key, config in plain.items()}
    return [Switch(one, "config", plain[id(one.config)]) for one in attentions]


def _without_fusion(config: Any) -> Any:
    plain = copy.copy(config)
    for name in ("apply_rope_fusion", "fused_single_qkv_rope"):
        if hasattr(plain, name):  # versions
            setattr(plain, name, False)
    return plain
