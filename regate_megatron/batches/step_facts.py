"""The facts of all microbatches of a step, one after the other: what is done once per step, not per microbatch.

Shapes: P positions of the step, microbatch by microbatch, row by row; N samples, X targets, I media and V visual
positions of the step, in that order; R rows as they are planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import MicrobatchFacts
from regate_megatron.batches.media import Media


class StepFacts:
    """Views over the facts of a step's microbatches; what is asked for is put together once.

    Attributes:
        microbatches: their facts.
    """

    def __init__(self, microbatches: Sequence[MicrobatchFacts]) -> None:
        self.microbatches = microbatches

    def flat(self, name: str) -> Tensor:
        """An attribute [B, S] of every microbatch, as [P]."""
        return torch.cat([getattr(one, name).reshape(-1) for one in self.microbatches])

    @cached_property
    def is_target_P(self) -> Tensor:
        """Where the targets are; bool."""
        return self.flat("is_target_BS")

    @cached_property
    def is_visual_P(self) -> Tensor:
        """Where the visual positions are; bool."""
        return self.flat("is_visual_BS")

    @cached_property
    def is_real_P(self) -> Tensor:
        """What is no padding; bool."""
        return self.flat("is_context_BS") | self.is_target_P

    @cached_property
    def is_read_P(self) -> Tensor:
        """What some loss depends on, see :class:`MicrobatchFacts`; bool."""
        return self.flat("is_read_BS")

    @cached_property
    def key_N2(self) -> Tensor:
        """Keys of difficulty; int64."""
        return torch.cat([one.difficulty_key_N2 for one in self.microbatches])

    @cached_property
    def key_M(self) -> Tensor:
        """Half of the key of each microbatch's first sample; int64."""
        return self.key_N2[self._first_sample_M, 0]

    @cached_property
    def num_target_N(self) -> Tensor:
        """Targets of each sample; int64."""
        at_N = self._target_X.searchsorted(self._end_N)
        return torch.from_numpy(np.diff(at_N, prepend=0))

    @cached_property
    def num_target_M(self) -> list[int]:
        """Targets of each microbatch."""
        at_M = self._target_X.searchsorted(np.cumsum(self.sizes))
        return np.diff(at_M, prepend=0).tolist()

    @cached_property
    def label_X(self) -> Tensor:
        """The label of each target; int64."""
        return torch.from_numpy(self.flat("label_BS").numpy()[self._target_X])

    @cached_property
    def place_X(self) -> Tensor:
        """The place of each target in its sample, from 0; int64."""
        return torch.from_numpy(self._target_X - self._start_N.repeat(self.num_target_N.numpy()))

    @cached_property
    def sizes(self) -> list[int]:
        """Positions of each microbatch, [M]; their sum is P."""
        return [one.is_target_BS.numel() for one in self.microbatches]

    @cached_property
    def planned_row_N(self) -> Tensor:
        """The row of the step that each sample is planned in; int64, ascending."""
        if self._has_plain_rows:
            return torch.arange(sum(self._rows))
        before_M = np.cumsum([0, *self._rows[:-1]]).tolist()
        pairs = zip(self.microbatches, before_M, strict=True)
        return torch.cat([one.planned_row_N + before for one, before in pairs])

    def count_by_row(self, where_P: Tensor) -> Tensor:
        """How many positions are marked in each row as it is planned; int64 [R]."""
        lengths = [one.planned_length for one in self.microbatches]
        if len(set(lengths)) == 1:
            return where_P.view(-1, lengths[0]).sum(dim=1)
        pairs = zip(where_P.split(self.sizes), lengths, strict=True)
        return torch.cat([where_Y.view(-1, length).sum(dim=1) for where_Y, length in pairs])

    # ------------------------------------------------------------------------------------------------ visual positions

    @cached_property
    def media(self) -> list[Media]:
        """The media of each microbatch."""
        return [one.media for one in self.microbatches]

    @cached_property
    def count_I(self) -> Tensor:
        """Visual positions of each medium; int64."""
        return torch.cat([one.count_I for one in self.media])

    @cached_property
    def sample_I(self) -> Tensor:
        """The sample of the step that each medium lies in; int64, ascending."""
        pairs = zip(self.media, self._first_sample_M.tolist(), strict=True)
        return torch.cat([one.sample_I + first for one, first in pairs])

    @cached_property
    def grid_I3(self) -> np.ndarray:
        """Frames, height and width of each medium; all 0 where they are not known; int64."""
        none = [np.zeros((len(one.count_I), 3), np.int64) if one.grid_I3 is None else None for one in self.media]
        pairs = zip(self.media, none, strict=True)
        return np.concatenate([one.grid_I3.numpy() if zeros is None else zeros for one, zeros in pairs])

    @cached_property
    def number_I(self) -> Tensor:
        """The number of each medium in its sample, from 0; int64."""
        return torch.arange(len(self.sample_I)) - torch.searchsorted(self.sample_I, self.sample_I)

    @cached_property
    def medium_V(self) -> Tensor:
        """The medium of each visual position; int64, ascending."""
        return torch.arange(len(self.count_I)).repeat_interleave(self.count_I)

    @cached_property
    def place_V(self) -> Tensor:
        """The place of each visual position in its medium's grid, below 0 in the lead; int64."""
        leads = [torch.zeros_like(one.count_I) if one.lead_I is None else one.lead_I for one in self.media]
        lead_I = torch.cat(leads)
        first_I = self.count_I.cumsum(0) - self.count_I + lead_I
        return torch.arange(len(self.medium_V)) - first_I.repeat_interleave(self.count_I)

    @cached_property
    def position_V(self) -> Tensor:
        """Where each visual position is among all of the step, from 0 to P; int64."""
        return torch.from_numpy(self.is_visual_P.numpy().nonzero()[0])

    @cached_property
    def may_go_V(self) -> Tensor:
        """Visual positions that hold a part of the picture and have no loss of their own; bool."""
        may_go_V = self.place_V >= 0
        if all(one.has_visual_loss_BS is None for one in self.microbatches):
            return may_go_V
        each = [(one.has_visual_loss_BS, one.is_visual_BS) for one in self.microbatches]
        has_loss = [torch.zeros_like(like_BS) if own_BS is None else own_BS for own_BS, like_BS in each]
        has_loss_P = torch.cat([of_BS.reshape(-1) for of_BS in has_loss])
        return may_go_V & ~has_loss_P[self.position_V]

    def place_in_sample_V(self) -> Tensor:
        """The place of each visual position in its sample, from 0; int64."""
        start_I = torch.from_numpy(self._start_N)[self.sample_I]
        return self.position_V - start_I.repeat_interleave(self.count_I)

    # ----------------------------------------------------------------------------------------------------- how it lies

    @cached_property
    def _has_plain_rows(self) -> bool:
        return all(one.sample_BS is None for one in self.microbatches)

    @cached_property
    def _rows(self) -> list[int]:
        """Rows of each microbatch as they are planned."""
        return [size // one.planned_length for size, one in zip(self.sizes, self.microbatches, strict=True)]

    @cached_property
    def _first_sample_M(self) -> Tensor:
        return torch.tensor([0, *accumulate(one.num_samples for one in self.microbatches[:-1])])

    @cached_property
    def _end_N(self) -> np.ndarray:
        """Where each sample ends, among all positions of the step."""
        lengths = [
            np.full(len(one.is_target_BS), one.dense_length) if one.sample_BS is None else one.segment_length_N.numpy()
            for one in self.microbatches
        ]
        return np.concatenate(lengths).cumsum()

    @cached_property
    def _start_N(self) -> np.ndarray:
        return np.concatenate([[0], self._end_N[:-1]])

    @cached_property
    def _target_X(self) -> np.ndarray:
        """Where each target is among all positions of the step."""
        return self.is_target_P.numpy().nonzero()[0]
