"""Batches of pretrain_vlm.py and LLaVAModel: text rows with one placeholder per image, expanded inside the model.

The merged row is what ``LLaVAModel._preprocess_data`` builds: each placeholder becomes ``image_length`` visual
positions; text keeps its order. A text position is a target where its loss mask is positive, unless an image follows
it directly (the model trains no token to predict an image); no visual position is a target.

Shapes: B rows, N text entries of a row (placeholders included), S merged positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_megatron.batches.facts import (
    MicrobatchFacts,
    before_last_target,
    content_keys,
    position_ids,
    to_cpu,
    trailing_padding,
    without_loss,
)
from regate_megatron.budget import align_up

_IMAGE_KEYS = ("image", "images", "imgs")


@dataclass(frozen=True)
class LLaVABatches:
    """Adapter for LLaVAModel batches.

    Attributes:
        image_length: visual positions per image (``LLaVAModel.img_seq_len``).
        image_token: the placeholder's id (``LLaVAModel.image_token_index``).
        max_length: the language model's longest merged row; longer ones are cut by the model.
        multiple: what the model pads merged rows to (sequence and context parallelism cut them evenly).
        packs: whether the script lays the rows of a microbatch one after the other where context parallelism has to pad
            them (pretrain_vlm.py does); "always": also where it need not.
        pads_to_max: whether the model pads every merged row to ``max_length`` (it does under pipeline parallelism).
    """

    image_length: int
    image_token: int
    max_length: int
    pads_to_max: bool
    multiple: int = 1
    packs: bool | str = False

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        self._check_images(batch)
        token_BN, label_BN = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        is_target_BN = self._text_targets(token_BN, to_cpu(batch["loss_mask"]) > 0)
        place_BN = self._places(token_BN)
        length = self._merged_length(token_BN)
        is_image_BN = token_BN == self.image_token
        is_padding_BN = trailing_padding(token_BN, is_target_BN) & ~is_image_BN

        def spread(value_BN: Tensor, where_BN: Tensor, empty: int) -> Tensor:
            merged_BS = torch.full((len(token_BN), length), empty, dtype=value_BN.dtype)
            row_X, entry_X = torch.where(where_BN & (place_BN < length))
            merged_BS[row_X, place_BN[row_X, entry_X]] = value_BN[row_X, entry_X]
            return merged_BS

        is_text_BS = spread(torch.ones_like(is_target_BN), ~is_image_BN, 0)
        is_target_BS = spread(is_target_BN, ~is_image_BN, 0)
        is_padding_BS = spread(is_padding_BN, ~is_image_BN, 0)
        inside_BS = torch.arange(length) <= place_BN[:, -1:].clamp_max(self.max_length - 1)
        is_visual_BS = inside_BS & ~is_text_BS
        text_rows, picture_rows = self._content(token_BN, label_BN, is_target_BN, is_padding_BN, batch)
        merged = {
            "is_target_BS": is_target_BS,
            "is_context_BS": inside_BS & ~is_target_BS & ~is_padding_BS,
            "is_visual_BS": is_visual_BS,
            "token_BS": spread(token_BN, ~is_image_BN, 0),
            "position_id_BS": self._position_ids(batch, token_BN, place_BN, length),
            "label_BS": spread(label_BN, ~is_image_BN, 0),
        }
        sample_BS = None
        if self._is_packed(place_BN):
            sample_BS = torch.arange(len(token_BN)).repeat_interleave(length)[None]
            merged = {name: value.reshape(1, -1) for name, value in merged.items()}
        return MicrobatchFacts(
            **merged,
            sample_BS=sample_BS,
            joins_rows=sample_BS is not None,
            reference_key_N2=content_keys(text_rows),
            difficulty_key_N2=content_keys(
                [text + pictures for text, pictures in zip(text_rows, picture_rows, strict=True)]
            ),
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        token_BN = to_cpu(batch["tokens"]).long()
        is_elided_BS = is_elided_BS.view(len(token_BN), -1)  # packed rows lie one after the other
        place_BN = self._places(token_BN)
        inside_BN = place_BN < is_elided_BS.shape[1]
        is_elided_BN = is_elided_BS.gather(1, place_BN.clamp_max(is_elided_BS.shape[1] - 1)) & inside_BN
        is_elided_BN &= token_BN != self.image_token
        return dict(batch, loss_mask=without_loss(batch["loss_mask"], is_elided_BN))

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

    @staticmethod
    def _images(batch: dict[str, Any]) -> Tensor | None:
        return next((to_cpu(batch[key]) for key in _IMAGE_KEYS if batch.get(key) is not None), None)

    def _position_ids(self, batch: dict[str, Any], token_BN: Tensor, place_BN: Tensor, length: int) -> Tensor:
        """The position id of the text entry each merged position belongs to (an image's are its placeholder's)."""
        entry_BS = torch.searchsorted(place_BN, torch.arange(length).expand(len(place_BN), -1).contiguous())
        return position_ids(batch, token_BN).gather(1, entry_BS.clamp_max(token_BN.shape[1] - 1))

    def _text_targets(self, token_BN: Tensor, has_loss_BN: Tensor) -> Tensor:
        is_image_BN = token_BN == self.image_token
        before_image_BN = torch.zeros_like(is_image_BN)
        before_image_BN[:, :-1] = is_image_BN[:, 1:]
        return has_loss_BN & ~is_image_BN & ~before_image_BN & (self._places(token_BN) < self._merged_length(token_BN))

    def _places(self, token_BN: Tensor) -> Tensor:
        """Merged position of each text entry (of a placeholder: its last visual position); int64 [B, N]."""
        width_BN = torch.where(token_BN == self.image_token, self.image_length, 1)
        return width_BN.cumsum(dim=1) - 1

    def _merged_length(self, token_BN: Tensor) -> int:
        longest = int(self._places(token_BN)[:, -1].max()) + 1
        if self.pads_to_max:
            return self.max_length
        return align_up(min(longest, self.max_length), self.multiple)

    def _content(self, token_BN: Tensor, label_BN: Tensor, is_target_BN: Tensor, is_padding_BN: Tensor, batch: dict):
        images = self._images(batch)
        first_image_B = (token_BN == self.image_token).sum(dim=1).cumsum(0).tolist()
        is_content_BN = before_last_target(is_target_BN, ~is_padding_BN)
        text_rows, picture_rows, start = [], [], 0
        for row, end in enumerate(first_image_B):
            real = is_content_BN[row]
            labels = torch.where(is_target_BN[row], label_BN[row], -1)
            layout = torch.tensor([self.image_length])
            text_rows.append([token_BN[row][real].numpy(), labels[real].numpy(), layout.numpy()])
            picture_rows.append([_bytes(images[start:end])] if images is not None and end > start else [])
            start = end
        return text_rows, picture_rows


def _bytes(images: Tensor):
    return images.contiguous().view(torch.uint8).reshape(-1).numpy()
