"""Batches of Megatron-Bridge's Qwen-VL models: one input id per visual token, so merged positions = text positions.

With ``cu_seqlens_q`` (``enable_in_batch_packing``) a batch is one packed row, a sample per segment.

The collators of Bridge write the placeholders of an image or video out in full (``image_token`` or ``video_token``, one
id per merged patch) and put pixels and grids into a ``visual_inputs`` object. The position ids of the batch are
ignored: the model makes its own, with three axes (mRoPE), from ids and grids, and the adapter asks the same function.

A visual position with loss (an image inside an answer) is context here: it always runs, and its loss counts as ever.

Shapes: B rows, S positions, I images (or videos) of the microbatch in the order of their placeholders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, position_ids, targets_of, to_cpu
from regate_megatron.batches.media import Media, some_of_each
from regate_megatron.batches.samples import Samples
from regate_megatron.batches.segments import Segments

_KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


def of_blocks(pixels: Tensor, _grid_3: Tensor, merge_size: int) -> np.ndarray:
    """A few values under each position, where patches that become one lie one after the other; float [N, D]."""
    return some_of_each(pixels.unflatten(0, (-1, merge_size**2)).flatten(1))


@dataclass(frozen=True)
class QwenVLBatches(BatchAdapter):
    """Adapter for Qwen2.5-VL batches of Megatron-Bridge.

    Attributes:
        image_token, video_token: the placeholders' ids (``config.image_token_id``, ``config.video_token_id``).
        merge_size: patches per side that become one visual token (``vision_config.spatial_merge_size``).
        rope_index: the model's ``get_rope_index``; without one positions are 0, 1, 2 …
        takes_positions: whether they are the batch's own instead.
        cells: what lies under each position of a medium, from its pixels, its grid [3] and ``merge_size``; [N, D].
    """

    image_token: int
    video_token: int
    merge_size: int
    rope_index: Callable[..., tuple[Tensor, Tensor]] | None = None
    takes_positions: bool = False
    cells: Callable[[Tensor, Tensor, int], np.ndarray] = of_blocks

    keys = (
        "input_ids or tokens, labels and loss_mask; visual_inputs, attention_mask and cu_seqlens_q where there are any"
    )

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        token_BS, label_BS = self._tokens(batch), to_cpu(batch["labels"]).long()
        if batch.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens (rows packed offline) where this version reads cu_seqlens_q")
        packed = Segments.of(batch, token_BS.shape)
        is_visual_BS = (token_BS == self.image_token) | (token_BS == self.video_token)
        is_target_BS, has_loss_BS = targets_of(batch["loss_mask"], label_BS)
        is_target_BS, has_visual_loss_BS = is_target_BS & ~is_visual_BS, has_loss_BS & is_visual_BS
        samples = Samples(
            token_BS,
            label_BS,
            is_target_BS,
            is_real_BN=is_visual_BS | has_loss_BS,
            length_N=None if packed is None else packed.length_N.numpy(),
            is_padding_BN=self._padding(batch, token_BS) if packed is None else packed.is_padding_1S,
        )
        found = self._found(batch, token_BS, packed)
        return MicrobatchFacts(
            is_target_BS=is_target_BS,
            is_context_BS=~is_target_BS & ~samples.is_padding_BN,
            is_visual_BS=is_visual_BS,
            media=self._media(found),
            has_visual_loss_BS=has_visual_loss_BS,
            token_BS=token_BS,
            position_id_BS=self._position_ids(batch, token_BS, packed),
            label_BS=label_BS,
            sample_BS=None if packed is None else packed.sample_1S,
            **samples.keys(**_content(found, len(token_BS) if packed is None else len(packed.real_N))),
        )

    @staticmethod
    def _tokens(batch: dict[str, Any]) -> Tensor:
        given = batch.get("tokens")
        return to_cpu(batch["input_ids"] if given is None else given).long()

    @staticmethod
    def _padding(batch: dict[str, Any], token_BS: Tensor) -> Tensor | None:
        """Rows are padded twice, by the processor and by the collator, with different ids: believe the mask."""
        mask = batch.get("attention_mask")
        return to_cpu(mask) == 0 if mask is not None and tuple(mask.shape) == tuple(token_BS.shape) else None

    def _position_ids(self, batch: dict[str, Any], token_BS: Tensor, packed: Segments | None) -> Tensor:
        """As ``Qwen25VLModel.forward`` makes them, axes last: int64 [B, S, 3]; [B, S] without ``rope_index``."""
        if self.takes_positions:
            return position_ids(batch, token_BS)
        if packed is not None:
            return packed.in_one_row(self._position_ids(batch, packed.as_rows(token_BS), None))
        if self.rope_index is None:
            return position_ids({}, token_BS)
        kind_BS = (token_BS == self.image_token).int() + 2 * (token_BS == self.video_token).int()
        visual = _visual_inputs(batch)
        grids = [visual.get(grid_name) for _, grid_name in _KINDS]
        seconds = visual.get("second_per_grid_ts")
        position_3BS, _ = self.rope_index(token_BS, kind_BS, *grids, second_per_grid_ts=seconds, attention_mask=None)
        return position_3BS.permute(1, 2, 0).long()

    def _found(self, batch: dict[str, Any], token_BS: Tensor, packed: Segments | None) -> list[_Medium]:
        """Images, then videos, each in the order of their placeholders.

        Raises:
            ValueError: placeholders, grids and pixels do not fit together.
        """
        found, visual = [], _visual_inputs(batch)
        for token, (pixel_name, grid_name) in zip((self.image_token, self.video_token), _KINDS, strict=True):
            pixels, grid_I3 = visual.get(pixel_name), visual.get(grid_name)
            if pixels is None or grid_I3 is None:
                if bool((token_BS == token).any()):
                    raise ValueError(f"placeholders {token} without {pixel_name}")
                continue
            seconds = visual.get("second_per_grid_ts") if token == self.video_token else None
            is_placeholder_BS = token_BS == token
            if packed is None:
                count_N = is_placeholder_BS.sum(dim=1)
            else:
                count_N = torch.bincount(packed.sample_1S[is_placeholder_BS], minlength=len(packed.real_N))
            found += self._of_kind(is_placeholder_BS, count_N, grid_I3, pixels, seconds)
        return found

    def _of_kind(
        self, is_placeholder_BS: Tensor, count_N: Tensor, grid_I3: Tensor, pixels: Tensor, seconds: Tensor | None
    ) -> list[_Medium]:
        """Samples take images in order until their placeholders are used."""
        place_P = torch.where(is_placeholder_BS.flatten())[0]
        patches_I = grid_I3.prod(dim=-1)
        last_token_I = (patches_I // self.merge_size**2).cumsum(0)
        last_token_N = count_N.cumsum(0)
        fits = bool(torch.isin(last_token_N[count_N > 0], last_token_I).all()) and last_token_I[-1] == last_token_N[-1]
        if not fits or int(patches_I.sum()) != len(pixels):
            raise ValueError(
                f"{len(pixels)} patches in grids of {patches_I.tolist()} for samples of {count_N.tolist()} placeholders"
            )
        sample_I = torch.searchsorted(last_token_N, last_token_I).tolist()
        place_I = place_P[last_token_I - 1].tolist()
        return [
            _Medium(sample, place, grid_I3[image], piece, None if seconds is None else seconds[image : image + 1])
            for image, (sample, place, piece) in enumerate(
                zip(sample_I, place_I, pixels.split(patches_I.tolist()), strict=True)
            )
        ]

    def _media(self, found: Sequence[_Medium]) -> Media:
        """Images and videos in the order in which they lie in the rows."""
        if not found:
            return Media.none()
        in_order = sorted(found, key=lambda one: one.place)
        grid_I3 = torch.stack([one.grid_3 for one in in_order]).long()
        grid_I3[:, 1:] //= self.merge_size
        return Media(
            sample_I=torch.tensor([one.sample for one in in_order]),
            count_I=grid_I3.prod(dim=1),
            grid_I3=grid_I3,
            pixels=lambda medium: self.cells(in_order[medium].pixels, in_order[medium].grid_3, self.merge_size),
        )


@dataclass(frozen=True)
class _Medium:
    """An image or video.

    Attributes:
        sample: it lies in.
        place: of its last placeholder in the rows laid one after the other.
        grid_3: frames, height and width in patches, not merged.
        pixels: its patches [t·h·w, width].
        second_1: seconds between its frames, where the batch says it.
    """

    sample: int
    place: int
    grid_3: Tensor
    pixels: Tensor
    second_1: Tensor | None = None


def _content(found: Sequence[_Medium], num_samples: int) -> dict[str, list[list[np.ndarray]]]:
    """What keys are made of beside text: the grids of each sample's media, and their pixels."""
    media: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
    pixels: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
    for one in found:
        media[one.sample].append(one.grid_3.numpy())
        if one.second_1 is not None:  # spaces the frames' positions
            media[one.sample].append(one.second_1.double().numpy())
        pixels[one.sample].append(one.pixels.contiguous().view(torch.uint8).reshape(-1).numpy())
    return {"media": media, "pixels": pixels}


def _visual_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Pixels and grids, flat as the model takes them; empty for a batch of text."""
    given = batch.get("visual_inputs")
    fields = given.normalized_for_model() if given is not None else {}
    return {name: to_cpu(value) for name, value in fields.items() if torch.is_tensor(value)}
