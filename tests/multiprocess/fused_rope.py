"""Stands for Transformer Engine's fused RoPE, which runs on a GPU alone: Megatron's unfused functions, with its limits.

One row of frequencies for all rows of a microbatch; and in packed rows the positions of every segment counted anew.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings import rope_utils


def install() -> None:
    """Put both kernels where Megatron looks for them; only a config that asks for fused RoPE calls one."""
    rope_utils.fused_apply_rotary_pos_emb = _of_rows
    rope_utils.fused_apply_rotary_pos_emb_thd = _of_segments


def _of_rows(t, freqs, interleaved=False):
    assert freqs.shape[1] == 1, "the kernel takes one row of frequencies"
    return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)


def _of_segments(t, cu_seqlens, freqs, cp_size=1, cp_rank=0, interleaved=False):
    assert cp_size == 1
    place_T = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], freqs[place_T], rotary_interleaved=interleaved)[:, 0]
