"""Batches of pretrain_vlm.py and LLaVAModel: text rows with one placeholder per image, expanded inside the model.

The merged row is what ``LLaVAModel._preprocess_data`` builds: each placeholder becomes ``image_length`` visual
positions; text keeps its order. A text position is a target where its loss mask is positive, unless an image follows
it directly (the model trains no token to predict an image); no visual position is a target.

Shapes: B rows, N text entries of a row (placeholders included), S merged positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import (
    BatchAdapter,
    MicrobatchFacts,
    position_ids,
    targets_of,
    to_cpu,
    without_loss,
)
from regate_megatron.batches.media import Media, cells_of_image, image_grid
from regate_megatron.batches.samples import Samples
from regate_megatron.method import masks
from regate_megatron.method.budget import align_up

_IMAGE_KEYS = ("image", "images", "imgs")


@dataclass(frozen=True)
class LLaVABatches(BatchAdapter):
    """Adapter for LLaVAModel batches.

    Attributes:
        image_length: visual positions per image (``LLaVAModel.img_seq_len``).
        image_token: the placeholder's id (``LLaVAModel.image_token_index``).
        max_length: the language model's longest merged row; longer ones are cut by the model.
        multiple: what the model pads merged rows to (sequence and context parallelism cut them evenly).
        packs: whether the script lays the rows of a microbatch one after the other where context parallelism has to pad
            them (pretrain_vlm.py does); "always": also where it need not.
        reads_position_ids: whether the language model has learned positions.
        pads_to_max: whether the model pads every merged row to ``max_length`` (it does under pipeline parallelism).
    """

    image_length: int
    image_token: int
    max_length: int
    pads_to_max: bool
    multiple: int = 1
    packs: bool | str = False
    reads_position_ids: bool = False

    keys = "tokens, labels and loss_mask; images, image or imgs (and num_image_tiles)"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        self._check_images(batch)
        token_BN, label_BN = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        num_rows, num_entries = token_BN.shape
        is_image_BN = token_BN == self.image_token
        place_BN = self._places(is_image_BN)
        length = self._merged_length(place_BN)
        is_text_BN = ~is_image_BN & (place_BN < length)
        is_target_BN, has_loss_BN = (
            self._of_text(is_image_BN, is_text_BN, where_BN) for where_BN in targets_of(batch["loss_mask"], label_BN)
        )
        merged_X = masks.take(place_BN + length * torch.arange(num_rows)[:, None], is_text_BN).numpy()

        def spread(value_BN: Tensor) -> Tensor:
            value_X = masks.take(value_BN, is_text_BN).numpy()
            merged_BS = np.zeros((num_rows, length), value_X.dtype)
            merged_BS.reshape(-1)[merged_X] = value_X
            return torch.from_numpy(merged_BS)

        samples = Samples(token_BN, label_BN, is_target_BN, is_real_BN=is_image_BN | has_loss_BN)
        is_target_BS, is_visual_BS = spread(is_target_BN), self._inside(place_BN, length) & ~spread(is_text_BN)
        merged = {
            "is_target_BS": is_target_BS,
            "is_context_BS": is_visual_BS | spread(~samples.is_padding_BN & ~is_target_BN),
            "is_visual_BS": is_visual_BS,
            "token_BS": spread(token_BN),
            "position_id_BS": self._position_ids(batch, token_BN, is_image_BN, length),
            "label_BS": spread(label_BN),
        }
        sample_BS = None
        if self._is_packed(place_BN):
            sample_BS = torch.arange(len(token_BN)).repeat_interleave(length)[None]
            merged = {name: value.reshape(1, -1) for name, value in merged.items()}
        return MicrobatchFacts(
            **merged,
            media=self._media(batch, is_image_BN, place_BN),
            sample_BS=sample_BS,
            joins_rows=sample_BS is not None,
            **samples.keys(
                position_ids(batch, token_BN) if self.reads_position_ids else None,  # an image's positions have none
                layout=[np.array([self.image_length])],
                pixels=self._pixels(batch, is_image_BN),
            ),
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        is_image_BN = to_cpu(batch["tokens"]) == self.image_token
        is_elided_BS = is_elided_BS.view(len(is_image_BN), -1)  # packed rows lie one after the other
        place_BN = self._places(is_image_BN)
        inside_BN = place_BN < is_elided_BS.shape[1]
        is_elided_BN = is_elided_BS.gather(1, place_BN.clamp_max(is_elided_BS.shape[1] - 1)) & inside_BN
        return dict(batch, loss_mask=without_loss(batch["loss_mask"], is_elided_BN & ~is_image_BN))

    def _is_packed(self, place_BN: Tensor) -> bool:
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

    def _check_images(self, batch: dict[str, Any]) -> None:
        """One image of ``image_length`` positions per placeholder; tiles and sizes would change the merged row."""
        for key in ("num_image_tiles", "num_tiles"):
            if batch.get(key) is not None and bool((to_cpu(batch[key]) != 1).any()):
                raise ValueError(f"{key} other than 1 in this version")
        if batch.get("imgs_sizes") is not None:
            raise ValueError("imgs_sizes (dynamic resolution) in this version")
        images = self._images(batch)
        count = int((to_cpu(batch["tokens"]) == self.image_token).sum())
        if images is not None and len(images) != count:
            raise ValueError(f"{len(images)} images for {count} placeholders {self.image_token}")

    def _media(self, batch: dict[str, Any], is_image_BN: Tensor, place_BN: Tensor) -> Media:
        """One medium per placeholder; of an image that the model cuts off, the first positions are left, or none."""
        last_I = masks.take(place_BN, is_image_BN)
        missing_I = (last_I + 1 - self.max_length).clamp_min(0)
        row_I, images = torch.where(is_image_BN)[0], self._given_images(batch)
        media = {"sample_I": row_I, "count_I": (self.image_length - missing_I).clamp_min(0)}
        grid = (
            image_grid(self.image_length, *images.shape[-2:]) if images is not None and len(images.shape) == 4 else None
        )
        if grid is None:
            return Media(**media)
        lead, *cells = grid
        return Media(
            **media,
            grid_I3=torch.tensor([[1, *cells]]).expand(len(row_I), -1),
            lead=lead,
            pixels=lambda image: cells_of_image(to_cpu(images[image]), *cells),
        )

    @classmethod
    def _images(cls, batch: dict[str, Any]) -> Tensor | None:
        given = cls._given_images(batch)
        return None if given is None else to_cpu(given)

    @staticmethod
    def _given_images(batch: dict[str, Any]) -> Any:
        return next((batch[key] for key in _IMAGE_KEYS if batch.get(key) is not None), None)

    def _position_ids(self, batch: dict[str, Any], token_BN: Tensor, is_image_BN: Tensor, length: int) -> Tensor:
        """The position id of the text entry each merged position belongs to (an image's are its placeholder's)."""
        num_rows, num_entries = token_BN.shape
        entry_BS = np.full((num_rows, length), num_entries - 1)
        for row, is_image_N in enumerate(is_image_BN.numpy()):
            entry_S = np.repeat(np.arange(num_entries), np.where(is_image_N, self.image_length, 1))[:length]
            entry_BS[row, : len(entry_S)] = entry_S
        return position_ids(batch, token_BN).gather(1, torch.from_numpy(entry_BS))

    def _of_text(self, is_image_BN: Tensor, is_text_BN: Tensor, where_BN: Tensor) -> Tensor:
        """What is marked, where the model leaves the loss mask as it is."""
        before_image_BN = torch.zeros_like(is_image_BN)
        before_image_BN[:, :-1] = is_image_BN[:, 1:]
        return where_BN & is_text_BN & ~before_image_BN

    def _places(self, is_image_BN: Tensor) -> Tensor:
        """Merged position of each text entry (of a placeholder: its last visual position); int64 [B, N]."""
        width_BN = np.where(is_image_BN.numpy(), self.image_length, 1)
        return torch.from_numpy(width_BN.cumsum(axis=1) - 1)

    def _merged_length(self, place_BN: Tensor) -> int:
        longest = int(place_BN[:, -1].max()) + 1
        if self.pads_to_max:
            return self.max_length
        return align_up(min(longest, self.max_length), self.multiple)

    def _inside(self, place_BN: Tensor, length: int) -> Tensor:
        """Mark the merged positions of each row that the model does not cut off; bool [B, S]."""
        return torch.arange(length) < (place_BN[:, -1:] + 1).clamp_max(self.max_length)

    def _pixels(self, batch: dict[str, Any], is_image_BN: Tensor) -> list[list[np.ndarray]] | None:
        """The bytes of each row's images."""
        images = self._images(batch)
        if images is None:
            return None
        by_row = images.split(is_image_BN.sum(dim=1).tolist())
        return [[_bytes(own)] if len(own) else [] for own in by_row]


def _bytes(images: Tensor):
    return images.contiguous().view(torch.uint8).reshape(-1).numpy()
