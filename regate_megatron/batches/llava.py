"""Batches of pretrain_vlm.py and LLaVAModel: text rows with one placeholder per image, expanded inside the model.

The merged row is what ``LLaVAModel._preprocess_data`` builds: each placeholder becomes the visual positions of its
image (:mod:`.tiles`, :mod:`.dynamic_pictures`); text keeps its order. A text position is a target where its loss mask
is positive, unless an image follows it directly (the model trains no token to predict an image); no visual position is
a target.

With ``cu_lengths`` (examples/multimodal) a batch is one packed row: where each sample starts, in merged positions. What
follows the last sample is one more, of padding alone.

Shapes: B rows, N text entries of a row (placeholders included), S merged positions; I images (placeholders).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.dynamic_pictures import DynamicPictures, Resolution
from regate_megatron.batches.facts import (
    BatchAdapter,
    MicrobatchFacts,
    position_ids,
    targets_of,
    to_cpu,
    without_loss,
)
from regate_megatron.batches.samples import Samples
from regate_megatron.batches.segments import samples_of
from regate_megatron.batches.tiles import Pictures, Tiles
from regate_megatron.method import masks
from regate_megatron.method.budget import align_up


@dataclass(frozen=True)
class LLaVABatches(BatchAdapter):
    """Adapter for LLaVAModel batches.

    Attributes:
        image_length: visual positions per tile (``LLaVAModel.img_seq_len``), where the resolution is not dynamic.
        image_token: the placeholder's id (``LLaVAModel.image_token_index``).
        max_length: the language model's longest merged row; longer ones are cut by the model.
        multiple: what the model pads merged rows to (sequence and context parallelism cut them evenly).
        packs: whether the script lays the rows of a microbatch one after the other where context parallelism has to pad
            them (pretrain_vlm.py does); "always": also where it need not.
        reads_position_ids: whether the language model has learned positions.
        pads_to_max: whether every merged row is padded to ``max_length``: by the model under pipeline parallelism, and
            before where tensor-parallel communication overlaps.
        resolution: what a model of dynamic resolution makes of patches; None: its pictures have one size.
    """

    image_length: int
    image_token: int
    max_length: int
    pads_to_max: bool
    multiple: int = 1
    packs: bool | str = False
    reads_position_ids: bool = False
    resolution: Resolution | None = None

    keys = (
        "tokens, labels and loss_mask; images, image or imgs (and num_image_tiles, num_frames, imgs_sizes); cu_lengths"
        " where rows are packed"
    )

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BN, label_BN = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        num_rows, num_entries = token_BN.shape
        is_image_BN = token_BN == self.image_token
        pictures = self._pictures(batch, is_image_BN)
        place_BN = self._places(is_image_BN, pictures.length_I)
        length = self._merged_length(place_BN)
        is_text_BN = ~is_image_BN & (place_BN < min(length, self.max_length))
        is_target_BN, has_loss_BN = (
            self._of_text(is_image_BN, is_text_BN, where_BN) for where_BN in targets_of(batch["loss_mask"], label_BN)
        )
        merged_X = masks.take(place_BN + length * torch.arange(num_rows)[:, None], is_text_BN).numpy()

        def spread(value_BN: Tensor) -> Tensor:
            value_X = masks.take(value_BN, is_text_BN).numpy()
            merged_BS = np.zeros((num_rows, length), value_X.dtype)
            merged_BS.reshape(-1)[merged_X] = value_X
            return torch.from_numpy(merged_BS)

        sample_BS, sample_BN = None, torch.arange(num_rows)[:, None].expand(-1, num_entries)
        if batch.get("cu_lengths") is not None:
            sample_BS = self._packed(batch["cu_lengths"], place_BN, length)
            sample_BN = sample_BS[:, place_BN[0].clamp_max(length - 1)]
        number = num_rows if sample_BS is None else int(sample_BS[0, -1]) + 1
        entries_N = torch.bincount(sample_BN.flatten(), minlength=number).numpy()
        real_BN = is_image_BN | has_loss_BN
        samples = Samples(token_BN, label_BN, is_target_BN, is_real_BN=real_BN, length_N=entries_N)
        is_target_BS, is_visual_BS = spread(is_target_BN), self._inside(place_BN, length) & ~spread(is_text_BN)
        merged = {
            "is_target_BS": is_target_BS,
            "is_context_BS": is_visual_BS | spread(~samples.is_padding_BN & ~is_target_BN),
            "is_visual_BS": is_visual_BS,
            "token_BS": spread(token_BN),
            "position_id_BS": self._position_ids(batch, token_BN, place_BN, length),
            "label_BS": spread(label_BN),
        }
        joins_rows = sample_BS is None and self._is_joined(place_BN)
        if joins_rows:
            sample_BS = torch.arange(num_rows).repeat_interleave(length)[None]
            merged = {name: value.reshape(1, -1) for name, value in merged.items()}
        sample_I = masks.take(sample_BN, is_image_BN)
        end_N = torch.bincount(sample_I, minlength=number).cumsum(0).tolist()
        own = [slice(*pair) for pair in pairwise([0, *end_N])]
        pixels = [pictures.bytes_of(one) for one in own]
        return MicrobatchFacts(
            **merged,
            media=pictures.media(sample_I, self._left(place_BN, is_image_BN, pictures.length_I)),
            sample_BS=sample_BS,
            joins_rows=joins_rows,
            **samples.keys(
                position_ids(batch, token_BN) if self.reads_position_ids else None,  # an image's positions have none
                layout=pictures.layout,
                media=[pictures.content(one) for one in own],
                pixels=pixels if any(pixels) else None,
            ),
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        is_image_BN = to_cpu(batch["tokens"]) == self.image_token
        is_elided_BS = is_elided_BS.view(len(is_image_BN), -1)  # packed rows lie one after the other
        place_BN = self._places(is_image_BN, self._pictures(batch, is_image_BN).length_I)
        inside_BN = place_BN < is_elided_BS.shape[1]
        is_elided_BN = is_elided_BS.gather(1, place_BN.clamp_max(is_elided_BS.shape[1] - 1)) & inside_BN
        return dict(batch, loss_mask=without_loss(batch["loss_mask"], is_elided_BN & ~is_image_BN))

    def _is_joined(self, place_BN: Tensor) -> bool:
        """Whether the script makes one row of all; it takes all rows to be as long as the longest.

        Raises:
            ValueError: they are not.
        """
        length_B = place_BN[:, -1] + 1
        if not self.packs or (self.packs != "always" and int(length_B.max()) % self.multiple == 0):
            return False
        if bool((length_B != length_B[0]).any()):
            raise ValueError(f"rows of {length_B.tolist()} merged positions that context parallelism lays into one")
        return True

    def _packed(self, cu_lengths: Any, place_BN: Tensor, length: int) -> Tensor:
        """The sample of each merged position of a packed row, what follows the last one among them; int64 [1, S].

        Raises:
            ValueError: the starts are no starts of text entries, or the script forgets them.
        """
        if self.multiple > 1:
            raise ValueError("packed rows under sequence or context parallelism, where the script forgets their starts")
        starts = to_cpu(torch.as_tensor(cu_lengths)).long()
        if starts.ndim != 2 or len(starts) != 1 or len(place_BN) != 1:
            raise ValueError(f"cu_lengths {tuple(starts.shape)} for {len(place_BN)} rows, not one of each")
        begins = torch.cat([torch.zeros(1, dtype=torch.int64), place_BN[0] + 1])
        if int(starts.max()) > length:
            raise ValueError(f"cu_lengths up to {int(starts.max())} in a row that the model cuts at {length} positions")
        if not bool(torch.isin(starts, begins).all()):
            raise ValueError(f"cu_lengths {starts[0].tolist()} that are no starts of text entries")
        return samples_of(torch.cat([starts, torch.tensor([[length]])], dim=1), length)

    def _pictures(self, batch: dict[str, Any], is_image_BN: Tensor) -> Pictures:
        """The pictures of the batch.

        Raises:
            ValueError: they do not fit together, or this model takes no such ones.
        """
        count = int(is_image_BN.sum())
        if self.resolution is not None:
            rows, most = len(is_image_BN), self.resolution.most_rows
            if count and most and rows > most:
                raise ValueError(f"imgs_sizes for {rows} rows, where this Megatron-Core counts all pictures in each")
            return DynamicPictures(batch, count, self.resolution)
        if batch.get("imgs_sizes") is not None:
            raise ValueError("imgs_sizes for a LLaVAModel that was not built with dynamic_resolution")
        return Tiles(batch, count, self.image_token, self.image_length)

    def _left(self, place_BN: Tensor, is_image_BN: Tensor, length_I: Tensor) -> Tensor:
        """The positions of each image that the model does not cut off; int64 [I]."""
        missing_I = (masks.take(place_BN, is_image_BN) + 1 - self.max_length).clamp_min(0)
        return (length_I - missing_I).clamp_min(0)

    def _position_ids(self, batch: dict[str, Any], token_BN: Tensor, place_BN: Tensor, length: int) -> Tensor:
        """The position id of the text entry each merged position belongs to (an image's are its placeholder's)."""
        entry_BS = torch.searchsorted(place_BN, torch.arange(length).repeat(len(place_BN), 1))
        return position_ids(batch, token_BN).gather(1, entry_BS.clamp_max(place_BN.shape[1] - 1))

    def _of_text(self, is_image_BN: Tensor, is_text_BN: Tensor, where_BN: Tensor) -> Tensor:
        """What is marked, where the model leaves the loss mask as it is."""
        before_image_BN = torch.zeros_like(is_image_BN)
        before_image_BN[:, :-1] = is_image_BN[:, 1:]
        return where_BN & is_text_BN & ~before_image_BN

    def _places(self, is_image_BN: Tensor, length_I: Tensor) -> Tensor:
        """Merged position of each text entry (of a placeholder: its last visual position); int64 [B, N]."""
        width_BN = torch.ones(is_image_BN.shape, dtype=torch.int64)
        return width_BN.masked_scatter(is_image_BN, length_I).cumsum(dim=1) - 1

    def _merged_length(self, place_BN: Tensor) -> int:
        longest = int(place_BN[:, -1].max()) + 1
        if self.pads_to_max:
            return self.max_length
        return align_up(min(longest, self.max_length), self.multiple)

    def _inside(self, place_BN: Tensor, length: int) -> Tensor:
        """Mark the merged positions of each row that the model does not cut off; bool [B, S]."""
        return torch.arange(length) < (place_BN[:, -1:] + 1).clamp_max(self.max_length)
