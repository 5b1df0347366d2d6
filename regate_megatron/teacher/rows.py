"""What the teacher reads: the text of each row, at its original positions, up to the last target.

``pad`` (the paper): every visual position holds the pad token, the sequence keeps its length. ``drop`` (default):
visual positions are left out and the rest keep their original positions in the rotary embedding, which equals masking
the placeholders in attention and is far cheaper on video.

Shapes: N rows for the teacher, K positions it reads, T targets at most; S positions of the merged row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regate_megatron.method.budget import align_up

_FIELDS = ("token_NK", "position_NK", "position_id_NK", "num_read_N", "target_slot_NT", "label_NT", "num_target_N")


@dataclass(frozen=True)
class TeacherRows:
    """A request to the teacher; int64 tensors on the CPU.

    Attributes:
        dense_length: S, for positions.
        token_NK: input tokens; fill at the end of a row.
        position_NK: their positions in the merged row, for the rotary embedding.
        position_id_NK: their position ids, for learned positions; with mrope [N, K, 3].
        num_read_N: real entries per row.
        target_slot_NT: where in K each target is predicted.
        label_NT: the token it predicts.
        num_target_N: targets per row; entries beyond are fill.
    """

    dense_length: int
    token_NK: Tensor
    position_NK: Tensor
    position_id_NK: Tensor
    num_read_N: Tensor
    target_slot_NT: Tensor
    label_NT: Tensor
    num_target_N: Tensor

    def __len__(self) -> int:
        return len(self.token_NK)

    @property
    def sizes(self) -> Tensor:
        """N, S, position axes beyond one, K and T; int64 [5]."""
        axes = self.position_id_NK.shape[2] if self.position_id_NK.dim() == 3 else 0
        return torch.tensor([len(self), self.dense_length, axes, self.token_NK.shape[1], self.label_NT.shape[1]])

    def pack(self) -> Tensor:
        """The request as one int64 vector."""
        return torch.cat([self.sizes, *(getattr(self, name).reshape(-1) for name in _FIELDS)])

    def rows_at(self, index_b: Tensor) -> TeacherRows:
        """Some of the rows."""
        return TeacherRows(self.dense_length, **{name: getattr(self, name)[index_b] for name in _FIELDS})

    @classmethod
    def unpack(cls, flat: Tensor) -> TeacherRows:
        """The inverse of :meth:`pack`."""
        at, fields = 5, {}
        for name, shape in _shapes(flat[:5]).items():
            size = math.prod(shape)
            fields[name] = flat[at : at + size].view(shape)
            at += size
        return cls(int(flat[1]), **fields)


def grown(rows: TeacherRows | None, sizes: Tensor) -> TeacherRows:
    """A request of the sizes given, none below its own: empty rows at the end, fill at the end of rows."""
    fields = {}
    for name, shape in _shapes(sizes).items():
        fields[name] = torch.zeros(shape, dtype=torch.int64)
        if rows is not None:
            own = getattr(rows, name)
            fields[name][tuple(slice(size) for size in own.shape)] = own
    return TeacherRows(int(sizes[1]), **fields)


def _shapes(sizes: Tensor) -> dict[str, tuple[int, ...]]:
    num_rows, _, axes, length, targets = sizes.tolist()
    widths = {"K": (length,), "T": (targets,), "N": ()}
    shapes = {name: (num_rows, *widths[name[-1]]) for name in _FIELDS}
    if axes:
        shapes["position_id_NK"] += (axes,)
    return shapes


def rows_for_teacher(
    token_NS: Tensor,
    position_id_NS: Tensor,
    label_NS: Tensor,
    is_target_NS: Tensor,
    is_context_NS: Tensor,
    is_visual_NS: Tensor,
    *,
    visual: str,
    pad_token: int | None,
    multiple: int = 1,
) -> TeacherRows:
    """Cut rows down to what the teacher reads.

    Args:
        token_NS, position_id_NS, label_NS: int64 [N, S], position ids of mrope [N, S, 3].
        is_target_NS, is_context_NS, is_visual_NS: bool [N, S], see :class:`MicrobatchFacts`.
        visual: "drop" or "pad".
        pad_token: the placeholder's id for "pad".
        multiple: K is aligned up to it.
    """
    num_positions = token_NS.shape[1]
    position_S = torch.arange(num_positions)
    last_target_N1 = torch.where(is_target_NS, position_S, -1).amax(dim=1, keepdim=True)
    reads_NS = (is_context_NS | is_target_NS) & (position_S <= last_target_N1)
    if visual == "drop":
        reads_NS &= ~is_visual_NS
    else:
        token_NS = torch.where(is_visual_NS, pad_token, token_NS)
    length = align_up(max(1, int(reads_NS.sum(dim=1).max())), multiple)
    position_NK, num_read_N = pack_positions(reads_NS, length)
    most_targets = max(1, int(is_target_NS.sum(dim=1).max()))
    target_NT, num_target_N = pack_positions(is_target_NS, most_targets)
    slot_NS = reads_NS.cumsum(dim=1) - 1
    return TeacherRows(
        dense_length=num_positions,
        token_NK=token_NS.gather(1, position_NK),
        position_NK=position_NK,
        position_id_NK=position_id_NS[torch.arange(len(position_NK))[:, None], position_NK],
        num_read_N=num_read_N,
        target_slot_NT=slot_NS.gather(1, target_NT).clamp_min(0),
        label_NT=label_NS.gather(1, target_NT),
        num_target_N=num_target_N,
    )


def pack_positions(kept_NS: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Kept positions of each row in ascending order, then fill up to ``length``.

    Fill slots come last, so that under causal attention no kept position reads them, and point at position 0. They are
    counted nowhere and have no loss.

    Returns:
        keep_idx_NK: int64 [N, K] with K = ``length``.
        num_kept_N: int64 [N], how many leading slots are real.

    Raises:
        ValueError: a row keeps more than ``length`` positions.
    """
    rows = [kept_S.nonzero()[0] for kept_S in kept_NS.numpy()]
    num_kept = [len(kept_K) for kept_K in rows]
    if max(num_kept) > length:
        raise ValueError(f"a row keeps {max(num_kept)} positions, more than the length {length}")
    keep_idx_NK = np.zeros((len(rows), length), np.int64)
    for row, kept_K in enumerate(rows):
        keep_idx_NK[row, : len(kept_K)] = kept_K
    return torch.from_numpy(keep_idx_NK), torch.from_numpy(np.array(num_kept))
