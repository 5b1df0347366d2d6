"""Batches of pretrain_vlm.py and LLaVAModel: text rows with one placeholder per image, expanded inside the model.

The merged row is what ``LLaVAModel._preprocess_data`` builds: each placeholder becomes ``image_length`` visual
positions per tile of its image; text keeps its order. A text position is a target where its loss mask is positive,
unless an image follows it directly (the model trains no token to predict an image); no visual position is a target.

Tiles of one image are pictures of their own, unless the batch says in ``num_frames`` that they are the frames of a
clip, in the order of time.

Shapes: B rows, N text entries of a row (placeholders included), S merged positions; I images (placeholders), T tiles.
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

_IMAGE_KEYS, _TILE_KEYS = ("image", "images", "imgs"), ("num_image_tiles", "num_tiles")


@dataclass(frozen=True)
class LLaVABatches(BatchAdapter):
    """Adapter for LLaVAModel batches.

    Attributes:
        image_length: visual positions per tile (``LLaVAModel.img_seq_len``).
        image_token: the placeholder's id (``LLaVAModel.image_token_index``).
        max_length: the language model's longest merged row; longer ones are cut by the model.
        multiple: what the model pads merged rows to (sequence and context parallelism cut them evenly).
        packs: whether the script lays the rows of a microbatch one after the other where context parallelism has to pad
            them (pretrain_vlm.py does); "always": also where it need not.
        reads_position_ids: whether the language model has learned positions.
        pads_to_max: whether every merged row is padded to ``max_length``: by the model under pipeline parallelism, and
            before where tensor-parallel communication overlaps.
    """

    image_length: int
    image_token: int
    max_length: int
    pads_to_max: bool
    multiple: int = 1
    packs: bool | str = False
    reads_position_ids: bool = False

    keys = "tokens, labels and loss_mask; images, image or imgs (and num_image_tiles, num_frames)"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BN, label_BN = to_cpu(batch["tokens"]).long(), to_cpu(batch["labels"]).long()
        num_rows, num_entries = token_BN.shape
        is_image_BN = token_BN == self.image_token
        tiles_I = self._tiles(batch, is_image_BN)
        place_BN = self._places(is_image_BN, tiles_I)
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

        samples = Samples(token_BN, label_BN, is_target_BN, is_real_BN=is_image_BN | has_loss_BN)
        is_target_BS, is_visual_BS = spread(is_target_BN), self._inside(place_BN, length) & ~spread(is_text_BN)
        merged = {
            "is_target_BS": is_target_BS,
            "is_context_BS": is_visual_BS | spread(~samples.is_padding_BN & ~is_target_BN),
            "is_visual_BS": is_visual_BS,
            "token_BS": spread(token_BN),
            "position_id_BS": self._position_ids(batch, token_BN, place_BN, length),
            "label_BS": spread(label_BN),
        }
        sample_BS = None
        if self._is_packed(place_BN):
            sample_BS = torch.arange(len(token_BN)).repeat_interleave(length)[None]
            merged = {name: value.reshape(1, -1) for name, value in merged.items()}
        return MicrobatchFacts(
            **merged,
            media=self._media(batch, is_image_BN, place_BN, tiles_I),
            sample_BS=sample_BS,
            joins_rows=sample_BS is not None,
            **samples.keys(
                position_ids(batch, token_BN) if self.reads_position_ids else None,  # an image's positions have none
                layout=[np.array([self.image_length])],
                media=[[own.numpy()] if bool((own != 1).any()) else [] for own in _by_row(tiles_I, is_image_BN)],
                pixels=self._pixels(batch, is_image_BN, tiles_I),
            ),
        )

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        is_image_BN = to_cpu(batch["tokens"]) == self.image_token
        is_elided_BS = is_elided_BS.view(len(is_image_BN), -1)  # packed rows lie one after the other
        place_BN = self._places(is_image_BN, self._tiles(batch, is_image_BN))
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

    def _tiles(self, batch: dict[str, Any], is_image_BN: Tensor) -> Tensor:
        """Tiles of each image, in the order of the placeholders; int64 [I].

        Raises:
            ValueError: images, tiles and placeholders do not fit together, or their sizes differ.
        """
        if batch.get("imgs_sizes") is not None:
            raise ValueError("imgs_sizes (dynamic resolution) in this version")
        count, images = int(is_image_BN.sum()), self._given_images(batch)
        given = next((batch[key] for key in _TILE_KEYS if batch.get(key) is not None), None)
        if given is None:
            if images is not None and len(images) != count:
                raise ValueError(f"{len(images)} images for {count} placeholders {self.image_token}")
            return torch.ones(count, dtype=torch.int64)
        tiles_I = to_cpu(torch.as_tensor(given)).long().flatten()
        if len(tiles_I) != count or bool((tiles_I < 1).any()):
            raise ValueError(f"tiles {_few(tiles_I)} for {count} placeholders {self.image_token}")
        if images is not None and len(images) != int(tiles_I.sum()):
            raise ValueError(f"{len(images)} images for tiles {_few(tiles_I)}")
        return tiles_I

    def _media(self, batch: dict[str, Any], is_image_BN: Tensor, place_BN: Tensor, tiles_I: Tensor) -> Media:
        """One medium per tile or clip; of what the model cuts off, the first positions are left, or none."""
        images = self._given_images(batch)
        grid = (
            image_grid(self.image_length, *images.shape[-2:]) if images is not None and len(images.shape) == 4 else None
        )
        lead, *cells = grid or (0, None, None)
        frames_I = self._frames(batch, tiles_I)
        if grid is None or lead:  # class tokens lie between the frames: no one grid
            frames_I = torch.ones_like(tiles_I)
        image_M = torch.arange(len(tiles_I)).repeat_interleave(tiles_I // frames_I)
        frames_M = frames_I[image_M]
        end_M = frames_M.cumsum(0)  # in tiles
        first_M, first_I = end_M - frames_M, tiles_I.cumsum(0) - tiles_I
        missing_I = (masks.take(place_BN, is_image_BN) + 1 - self.max_length).clamp_min(0)
        left_M = (tiles_I * self.image_length - missing_I)[image_M] - (first_M - first_I[image_M]) * self.image_length
        media = {
            "sample_I": torch.where(is_image_BN)[0][image_M],
            "count_I": left_M.clamp_min(0).minimum(frames_M * self.image_length),
        }
        if grid is None:
            return Media(**media)

        def pixels(medium: int) -> np.ndarray:
            own = to_cpu(images[int(first_M[medium]) : int(end_M[medium])])
            return np.concatenate([cells_of_image(tile, *cells) for tile in own])

        grid_M3 = torch.cat((frames_M[:, None], torch.tensor([cells]).expand(len(frames_M), -1)), dim=1)
        return Media(**media, grid_I3=grid_M3, lead_I=torch.full_like(frames_M, lead), pixels=pixels)

    @staticmethod
    def _frames(batch: dict[str, Any], tiles_I: Tensor) -> Tensor:
        """How many of each image's tiles are frames of one clip: one, or all.

        Raises:
            ValueError: another number.
        """
        if batch.get("num_frames") is None:
            return torch.ones_like(tiles_I)
        frames_I = to_cpu(torch.as_tensor(batch["num_frames"])).long().flatten()
        if len(frames_I) != len(tiles_I) or bool(((frames_I != 1) & (frames_I != tiles_I)).any()):
            raise ValueError(f"num_frames {_few(frames_I)} for tiles {_few(tiles_I)}, not 1 or all tiles of each image")
        return frames_I

    @classmethod
    def _images(cls, batch: dict[str, Any]) -> Tensor | None:
        given = cls._given_images(batch)
        return None if given is None else to_cpu(given)

    @staticmethod
    def _given_images(batch: dict[str, Any]) -> Any:
        """[T, C, H, W]; a collator that stacks clips makes one more axis of their frames."""
        given = next((batch[key] for key in _IMAGE_KEYS if batch.get(key) is not None), None)
        return given.flatten(0, 1) if torch.is_tensor(given) and given.ndim == 5 else given

    def _position_ids(self, batch: dict[str, Any], token_BN: Tensor, place_BN: Tensor, length: int) -> Tensor:
        """The position id of the text entry each merged position belongs to (an image's are its placeholder's)."""
        entry_BS = torch.searchsorted(place_BN, torch.arange(length).repeat(len(place_BN), 1))
        return position_ids(batch, token_BN).gather(1, entry_BS.clamp_max(place_BN.shape[1] - 1))

    def _of_text(self, is_image_BN: Tensor, is_text_BN: Tensor, where_BN: Tensor) -> Tensor:
        """What is marked, where the model leaves the loss mask as it is."""
        before_image_BN = torch.zeros_like(is_image_BN)
        before_image_BN[:, :-1] = is_image_BN[:, 1:]
        return where_BN & is_text_BN & ~before_image_BN

    def _places(self, is_image_BN: Tensor, tiles_I: Tensor) -> Tensor:
        """Merged position of each text entry (of a placeholder: its last visual position); int64 [B, N]."""
        width_BN = torch.ones(is_image_BN.shape, dtype=torch.int64)
        return width_BN.masked_scatter(is_image_BN, tiles_I * self.image_length).cumsum(dim=1) - 1

    def _merged_length(self, place_BN: Tensor) -> int:
        longest = int(place_BN[:, -1].max()) + 1
        if self.pads_to_max:
            return self.max_length
        return align_up(min(longest, self.max_length), self.multiple)

    def _inside(self, place_BN: Tensor, length: int) -> Tensor:
        """Mark the merged positions of each row that the model does not cut off; bool [B, S]."""
        return torch.arange(length) < (place_BN[:, -1:] + 1).clamp_max(self.max_length)

    def _pixels(self, batch: dict[str, Any], is_image_BN: Tensor, tiles_I: Tensor) -> list[list[np.ndarray]] | None:
        """The bytes of each row's images."""
        images = self._images(batch)
        if images is None:
            return None
        by_row = images.split([int(own.sum()) for own in _by_row(tiles_I, is_image_BN)])
        return [[_bytes(own)] if len(own) else [] for own in by_row]


def _by_row(value_I: Tensor, is_image_BN: Tensor) -> tuple[Tensor, ...]:
    """The images of each row."""
    return value_I.split(is_image_BN.sum(dim=1).tolist())


def _bytes(images: Tensor):
    return images.contiguous().view(torch.uint8).reshape(-1).numpy()


def _few(value_I: Tensor) -> str:
    """Up to eight of them, for a message."""
    return f"{value_I[:8].tolist()}{' and more' if len(value_I) > 8 else ''}"
