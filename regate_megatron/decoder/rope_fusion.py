"""Fused RoPE, off where its kernels would not take the positions that slots have.

The fused kernels take one row of frequencies for all rows of a microbatch, and in packed rows count the positions of
every segment anew. Slots of a short range have positions of their own in every row. Whether an attention fuses is read
from its config in every forward; so where rows are several, or packed, it gets a copy of it that says no for the whole
of a sparse step (recompute runs short layers again in backward). Dense steps fuse as ever, and so do the dense layers
of a sparse one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def fusing(modules: Iterable[Any]) -> list[Any]:
    """The attentions among them whose config asks for fused RoPE."""
    from megatron.core.transformer.attention import Attention

    return [one for one in modules if isinstance(one, Attention) and one.config.apply_rope_fusion]


@contextmanager
def unfused(attentions: Sequence[Any]) -> Iterator[None]:
    """Configs that ask for no fused RoPE, and their own again afterwards, however it ends."""
    own = [one.config for one in attentions]
    plain = {id(config): _without_fusion(config) for config in own}
    try:
        for one, config in zip(attentions, own, strict=True):
            one.config = plain[id(config)]
        yield
    finally:
        for one, config in zip(attentions, own, strict=True):
            one.config = config


def _without_fusion(config: Any) -> Any:
    plain = copy.copy(config)
    for name in ("apply_rope_fusion", "fused_single_qkv_rope"):
        if hasattr(plain, name):  # versions
            setattr(plain, name, False)
    return plain
