"""One small fixed row, whose losses tell teachers apart where no list of settings does.

Its tokens follow from the vocabulary's size alone. They are few and lie far apart, so that what changes distant
positions only (a scaling of rotary frequencies) shows in few tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from regate_megatron.method.budget import align_up
from regate_megatron.teacher.rows import TeacherRows

_TOKENS, _SPAN = 32, 4096


def probe_rows(model: Any, multiple: int) -> TeacherRows:
    """The row, for a teacher of this architecture; K - 1 targets of K tokens.

    Args:
        model: a chunk of it.
        multiple: K is aligned up to it.
    """
    span = model.max_sequence_length if model.position_embedding_type == "learned_absolute" else _SPAN
    place_K = torch.arange(min(_TOKENS, span))
    # Dense at first, then ever further apart, up to the last position.
    position_K = torch.maximum(place_K, ((place_K / max(1, len(place_K) - 1)) ** 3 * (span - 1)).round().long())
    token_K = (place_K * place_K * 7919 + place_K * 31 + 11) % model.vocab_size
    count, length = len(place_K), align_up(len(place_K), multiple)
    position_NK = _filled(position_K, length)
    axes = 3 if model.position_embedding_type == "mrope" else 1
    return TeacherRows(
        dense_length=align_up(span, multiple),
        token_NK=_filled(token_K, length),
        position_NK=position_NK,
        position_id_NK=position_NK if axes == 1 else position_NK[:, :, None].expand(-1, -1, axes),
        num_read_N=torch.tensor([count]),
        target_slot_NT=place_K[None, :-1],
        label_NT=token_K[None, 1:],
        num_target_N=torch.tensor([count - 1]),
    )


def _filled(value_K: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(value_K, (0, length - len(value_K)))[None]
