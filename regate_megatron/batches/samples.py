"""What the samples of a batch are made of: where their padding is, and their two keys; the same for every family.

*Padding*, unless the batch says where it is, is the run of two or more equal tokens that ends a sample after all that
is real. Megatron's datasets rewrite the pad id, so it cannot be told by its value. No target reads what follows the
last target, hence a wrong guess here could not change a loss.

*Keys* are made of everything up to the last target, or of all that is no padding in a sample without targets: no loss
depends on what follows, so the same sample has one key however it ends or is padded.

Shapes: B rows, N entries of a row as the batch has it (tokens, and placeholders of images); X entries of the samples,
one sample after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import content_keys, unusual_positions

_Arrays = Sequence[np.ndarray]


class Samples:
    """The samples of a microbatch.

    Args:
        token_BN, label_BN: int64; labels already shifted.
        is_target_BN: bool.
        is_real_BN: what is no padding, whatever it holds: what has a loss (targets at least), placeholders of images;
            bool.
        length_N: entries of each sample, at least 1. None: every row is a sample.
        is_padding_BN: where the batch itself says that there is nothing; bool. None: it does not say.

    Attributes:
        is_padding_BN: bool.
    """

    def __init__(
        self,
        token_BN: Tensor,
        label_BN: Tensor,
        is_target_BN: Tensor,
        *,
        is_real_BN: Tensor,
        length_N: np.ndarray | None = None,
        is_padding_BN: Tensor | None = None,
    ) -> None:
        token_X, is_target_X, is_real_X = (_flat(value) for value in (token_BN, is_target_BN, is_real_BN))
        if length_N is None:
            length_N = np.full(len(token_BN), token_BN.shape[1])
        end_N = length_N.cumsum()
        start_N = end_N - length_N
        key_N = _after_last(is_target_X, start_N, end_N)
        if is_padding_BN is None:
            is_padding_X = np.zeros_like(is_target_X)
            real_N = _after_last((token_X != np.repeat(token_X[end_N - 1], length_N)) | is_real_X, start_N, end_N)
            for start, end in zip((start_N + real_N).tolist(), end_N.tolist(), strict=True):
                is_padding_X[start:end] = end - start > 1
        else:
            is_padding_X = _flat(is_padding_BN) & ~is_real_X
        self.is_padding_BN = torch.from_numpy(is_padding_X).view_as(is_target_BN)
        self._columns = token_X, np.where(is_target_X, _flat(label_BN), -1)  # no label without loss
        self._places = [
            slice(start, start + key) if key else start + np.flatnonzero(~is_padding_X[start:end])
            for start, end, key in zip(start_N.tolist(), end_N.tolist(), key_N.tolist(), strict=True)
        ]

    def keys(
        self,
        position_id_BN: Tensor | None = None,
        *,
        layout: _Arrays = (),
        media: Sequence[_Arrays] | None = None,
        pixels: Sequence[_Arrays] | None = None,
    ) -> dict[str, Tensor]:
        """Both keys, as :class:`MicrobatchFacts` names them.

        Args:
            position_id_BN: the ids of tokens, where the model's losses depend on them; int64, with mrope [B, N, 3].
                Those of mrope are relative: an offset changes no loss.
            layout: what every sample has in common that its losses depend on.
            media: what the losses of each sample depend on beside its text, the bytes of pictures left out.
            pixels: the bytes of each sample's pictures; they count for the difficulty alone.
        """
        id_X = None if position_id_BN is None else position_id_BN.flatten(0, 1).numpy()
        rows = []
        for number, place in enumerate(self._places):
            row = [*(column_X[place] for column_X in self._columns), *layout]
            if not isinstance(place, slice):  # where its content lies from its first entry on
                row += unusual_positions(place - place[:1])
            if id_X is not None:
                own_X = id_X[place]
                row += unusual_positions(own_X - own_X[:1] if own_X.ndim > 1 else own_X)
            rows.append(row if media is None else [*row, *media[number]])
        keys = reference_N2 = content_keys(rows)
        if pixels is not None:
            keys = content_keys([[*row, *own] for row, own in zip(rows, pixels, strict=True)])
        return {"reference_key_N2": reference_N2, "difficulty_key_N2": keys}


def _flat(value_BN: Tensor) -> np.ndarray:
    return value_BN.flatten().numpy()


def _after_last(where_X: np.ndarray, start_N: np.ndarray, end_N: np.ndarray) -> np.ndarray:
    """How many entries of each sample there are up to the last marked one; 0 where none is; int64 [N]."""
    after_X = np.concatenate([[0], np.flatnonzero(where_X) + 1])
    return np.maximum(after_X[after_X.searchsorted(end_N, side="right") - 1] - start_N, 0)
