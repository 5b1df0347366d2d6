"""Batches whose placeholders are written out in full: one input id per visual position, merged positions = text ones.

With ``cu_seqlens_q`` a batch is one packed row, a sample per segment. What differs between families is which positions
are placeholders of which kind, the media that the batch brings for them, and the position ids of the model.

A visual position with loss (an image inside an answer) is context here: it always runs, and its loss counts as ever.

Shapes: B rows, S positions, N samples, I media of one kind in the order of their placeholders.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, position_ids, targets_of, to_cpu
from regate_megatron.batches.media import Media
from regate_megatron.batches.samples import Samples
from regate_megatron.batches.segments import Segments


@dataclass(frozen=True)
class Medium:
    """An image or clip.

    Attributes:
        count: its visual positions.
        pixels: the bytes that tell it from others.
        grid: frames, height and width in visual positions, after what leads them; None: not known, an image.
        lead: visual positions before the grid.
        values: gives values of what lies under every place of the grid; float [N, D].
        content: what its row's reference losses depend on beside its text.
        sample, place: the sample it lies in, and the place of its last placeholder in the rows laid one after the
            other.
    """

    count: int
    pixels: Tensor
    grid: tuple[int, int, int] | None
    values: Callable[[], np.ndarray]
    lead: int = 0
    content: tuple[np.ndarray, ...] = field(default=())
    sample: int = 0
    place: int = 0


class PlaceholderBatches(BatchAdapter):
    """Adapter of a family with one id per visual position; a family says the first two methods below.

    Attributes:
        pixels_in: where a batch has its pixels.
    """

    pixels_in = "pixel_values"

    keys = (
        "input_ids or tokens, labels and loss_mask; visual_inputs, attention_mask and cu_seqlens_q where there are any"
    )

    @abstractmethod
    def kinds(self, batch: dict[str, Any], token_BS: Tensor) -> Tensor:
        """0 where a position is text, else the number of the kind of medium whose placeholder it is; int [B, S]."""

    @abstractmethod
    def media(self, batch: dict[str, Any], count_of: Mapping[int, int]) -> dict[int, list[Medium]]:
        """The media of every kind that the batch brings, each in the order of its placeholders.

        Args:
            count_of: how many placeholders of each kind the batch has.

        Raises:
            ValueError: they do not fit together.
        """

    def positions(self, batch: dict[str, Any], token_BS: Tensor, kind_BS: Tensor, packed: Segments | None) -> Tensor:
        """The model's own position ids; int64 [B, S], with mrope [B, S, 3]. Here: 0, 1, 2 … in every sample."""
        if packed is None:
            return position_ids({}, token_BS)
        return packed.in_one_row(position_ids({}, packed.as_rows(token_BS)))

    def padding(self, batch: dict[str, Any], token_BS: Tensor, packed: Segments | None) -> Tensor | None:
        """Where the batch says that there is nothing; bool [B, S], None where it does not say.

        Rows are padded twice, by the processor and by the collator, with different ids: believe the mask.
        """
        if packed is not None:
            return packed.is_padding_1S
        mask = batch.get("attention_mask")
        return to_cpu(mask) == 0 if mask is not None and tuple(mask.shape) == tuple(token_BS.shape) else None

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        given = batch.get("tokens")
        token_BS = to_cpu(batch["input_ids"] if given is None else given).long()
        label_BS = to_cpu(batch["labels"]).long()
        if batch.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens (rows packed offline) where this version reads cu_seqlens_q")
        packed = Segments.of(batch, token_BS.shape)
        kind_BS = self.kinds(batch, token_BS)
        is_visual_BS = kind_BS > 0
        is_target_BS, has_loss_BS = targets_of(batch["loss_mask"], label_BS)
        is_target_BS, has_visual_loss_BS = is_target_BS & ~is_visual_BS, has_loss_BS & is_visual_BS
        samples = Samples(
            token_BS,
            label_BS,
            is_target_BS,
            is_real_BN=is_visual_BS | has_loss_BS,
            length_N=None if packed is None else packed.length_N.numpy(),
            is_padding_BN=self.padding(batch, token_BS, packed),
        )
        found = self._found(batch, kind_BS, packed)
        return MicrobatchFacts(
            is_target_BS=is_target_BS,
            is_context_BS=~is_target_BS & ~samples.is_padding_BN,
            is_visual_BS=is_visual_BS,
            media=_media(found),
            has_visual_loss_BS=has_visual_loss_BS,
            token_BS=token_BS,
            position_id_BS=self.positions(batch, token_BS, kind_BS, packed),
            label_BS=label_BS,
            sample_BS=None if packed is None else packed.sample_1S,
            **samples.keys(**_content(found, len(token_BS) if packed is None else len(packed.real_N))),
        )

    def _found(self, batch: dict[str, Any], kind_BS: Tensor, packed: Segments | None) -> list[Medium]:
        """All media, kind by kind, with where they lie.

        Raises:
            ValueError: placeholders and media do not fit together.
        """
        number, count = kind_BS[kind_BS > 0].unique(return_counts=True)
        count_of = dict(zip(number.tolist(), count.tolist(), strict=True))
        brought, found = self.media(batch, count_of), []
        for kind in sorted({*count_of, *brought}):
            is_placeholder_BS = kind_BS == kind
            if packed is None:
                count_N = is_placeholder_BS.sum(dim=1)
            else:
                count_N = torch.bincount(packed.sample_1S[is_placeholder_BS], minlength=len(packed.real_N))
            if count_N.any() and not brought.get(kind):
                raise ValueError(f"{count_of[kind]} placeholders without {self.pixels_in}")
            found += _placed(brought[kind], is_placeholder_BS, count_N)
        return found


def _placed(media: Sequence[Medium], is_placeholder_BS: Tensor, count_N: Tensor) -> list[Medium]:
    """Samples take media in order until their placeholders are used."""
    if not media:
        return []
    last_token_I = torch.tensor([one.count for one in media]).cumsum(0)
    last_token_N = count_N.cumsum(0)
    fits = bool(torch.isin(last_token_N[count_N > 0], last_token_I).all()) and last_token_I[-1] == last_token_N[-1]
    if not fits or not all(one.count for one in media):
        raise ValueError(
            f"media of {[one.count for one in media]} positions for samples of {count_N.tolist()} placeholders"
        )
    sample_I = torch.searchsorted(last_token_N, last_token_I).tolist()
    place_I = torch.where(is_placeholder_BS.flatten())[0][last_token_I - 1].tolist()
    return [
        replace(one, sample=sample, place=place) for one, sample, place in zip(media, sample_I, place_I, strict=True)
    ]


def _media(found: Sequence[Medium]) -> Media:
    """Media in the order in which they lie in the rows."""
    if not found:
        return Media.none()
    in_order = sorted(found, key=lambda one: one.place)
    has_grids = all(one.grid is not None for one in in_order)
    return Media(
        sample_I=torch.tensor([one.sample for one in in_order]),
        count_I=torch.tensor([one.count for one in in_order]),
        grid_I3=torch.tensor([one.grid or (0, 0, 0) for one in in_order]),
        lead_I=torch.tensor([one.lead for one in in_order]),
        pixels=(lambda medium: in_order[medium].values()) if has_grids else None,
    )


def _content(found: Sequence[Medium], num_samples: int) -> dict[str, list[list[np.ndarray]]]:
    """What keys are made of beside text: each sample's media, and their pixels."""
    media: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
    pixels: list[list[np.ndarray]] = [[] for _ in range(num_samples)]
    for one in found:
        media[one.sample] += one.content
        pixels[one.sample].append(one.pixels.contiguous().view(torch.uint8).reshape(-1).numpy())
    return {"media": media, "pixels": pixels}


def visual_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Pixels, grids and sizes of a batch of Megatron-Bridge's, flat as the model takes them; empty for one of text."""
    given = batch.get("visual_inputs")
    fields = given.normalized_for_model() if given is not None else {}
    return {name: to_cpu(value) for name, value in fields.items() if torch.is_tensor(value)}
