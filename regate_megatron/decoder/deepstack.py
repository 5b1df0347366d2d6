"""Visual features that a decoder adds to what its first layers put out (deepstack, as Qwen3-VL has it).

The block adds feature i after its layer i, at the visual positions, and counts its layers from 0. So the dense range
gets its own features as they come, and a range that begins later must get none. Features of later layers are laid out
at full length, zeros where no picture is, and travel like the kept states; each is added after its layer, which runs as
a range by itself.

Shapes: L local positions of the dense sequence, B rows, V visual positions among them, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate_megatron.compat import is_one_of

_MASK, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
# Blocks that ask for their mask as [L, B]; the others as [B, L].
_BY_POSITION = ("mcore_bridge.model.mm_gpts.qwen3_vl.Qwen3VLTransformerBlock",)


def take_later(arguments: dict[str, Any], num_dense: int, block: Any) -> list[Tensor]:
    """Leave the features of the dense layers in the ``arguments`` of ``block``, and take out those of later ones.

    Returns:
        one [L, B, H] for each layer from ``num_dense`` on; nothing where the block has none, or no picture came.
    """
    features, is_visual = arguments.get(_FEATURES), arguments.get(_MASK)
    if features is None:
        return []
    arguments[_FEATURES] = features[:num_dense] if num_dense else None
    if is_visual is None:
        return []
    is_visual_LB = is_visual if is_one_of(block, _BY_POSITION) else is_visual.t()
    return [_spread(one_VH, is_visual_LB, by_row=is_visual_LB is not is_visual) for one_VH in features[num_dense:]]


def drop(arguments: dict[str, Any]) -> None:
    """Leave no feature in the ``arguments``: the dense layers have run."""
    for name in (_MASK, _FEATURES):
        if name in arguments:
            arguments[name] = None


def _spread(feature_VH: Tensor, is_visual_LB: Tensor, *, by_row: bool) -> Tensor:
    """Features at their positions, zeros elsewhere; they lie in the order of rows, or else of positions."""
    if by_row:
        row_V, place_V = torch.where(is_visual_LB.t())
    else:
        place_V, row_V = torch.where(is_visual_LB)
    dense_LBH = feature_VH.new_zeros(*is_visual_LB.shape, feature_VH.shape[-1])
    return dense_LBH.index_put((place_V, row_V), feature_VH)
