"""The sorts of candidates: where they are in a batch, which have a share of their own, how they are scored.

A sort is one class here. Budgets, selection and plans know candidates only (:mod:`regate_megatron.method.candidates`).

Shapes: B rows, S positions, G groups, X candidates of a microbatch or of the step, in order of groups and positions; V
visual positions of a microbatch, I images and clips (media) of a microbatch or of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches import Media, MicrobatchFacts
from regate_megatron.config import ReGateConfig, flag
from regate_megatron.errors import refuse
from regate_megatron.memory.learned import Learned
from regate_megatron.method import masks
from regate_megatron.method.chance import uniform_in_0_1
from regate_megatron.method.schedule import keep_ratio_of
from regate_megatron.method.scores import SCORES, Signals
from regate_megatron.method.visual_scores import VISUAL_SCORES, VisualSignals
from regate_megatron.step.step import Step


class CandidateSort(Protocol):
    """One sort of candidates."""

    def keep_ratio(self, number: int) -> float:
        """p in step ``number``; 1.0: all of them run, and they are no candidates."""
        ...

    def where(self, facts: MicrobatchFacts) -> Tensor:
        """The candidates; bool [B, S]."""
        ...

    def groups(self, facts: MicrobatchFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """Per group the number of candidates, the row it is planned in, the fewest that run; int64 [G]."""
        ...

    def score(self, step: Step) -> Tensor:
        """The score of every candidate of the step, microbatch by microbatch; float64 [X]. All planners call this."""
        ...


class Targets:
    """Answer tokens, ranked by a row of :data:`~regate_megatron.method.scores.SCORES`.

    A group is a sample; or, where a packed row counts as one, the row.
    """

    def __init__(self, config: ReGateConfig, learned: Learned) -> None:
        self.config, self.learned = config, learned

    def keep_ratio(self, number: int) -> float:
        """See :class:`CandidateSort`."""
        return keep_ratio_of(number, self.config.keep_ratio, self.config.keep_ratio_end, self.config.schedule)

    def where(self, facts: MicrobatchFacts) -> Tensor:
        """See :class:`CandidateSort`."""
        return facts.is_target_BS

    def groups(self, facts: MicrobatchFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`CandidateSort`."""
        if self.config.packed_ratio == "row":
            count_R = facts.count_by_row(facts.is_target_BS)
            return count_R, torch.arange(len(count_R)), None
        return facts.num_target_N, facts.planned_row_N, None

    def score(self, step: Step) -> Tensor:
        """See :class:`CandidateSort`; communicates where difficulty is asked for, and notes which targets have one."""
        facts, row = step.facts, SCORES[self.config.score]
        key_N2 = torch.cat([one.difficulty_key_N2 for one in facts])
        num_target_N = torch.cat([one.num_target_N for one in facts])
        difficulty_X = None
        if row.needs_difficulty:
            label_X = torch.cat([one.label_X for one in facts])
            difficulty_X, is_known_X = self.learned.look_up(key_N2, num_target_N, label_X, step.number)
            step.is_known = is_known_X.split([one.num_targets for one in facts])
        signals = Signals(
            difficulty_X=difficulty_X,
            reference_X=torch.cat(list(step.reference)).double() if row.needs_reference else None,
            reference_weight=self.config.reference_weight,
            fusion=self.config.fusion,
            keys=lambda: (key_N2.repeat_interleave(num_target_N, dim=0), torch.cat([one.place_X for one in facts])),
            seed=self.config.seed,
            step=step.number,
        )
        return row.of(signals)


class Visual:
    """Visual positions, ranked by a row of :data:`~regate_megatron.method.visual_scores.VISUAL_SCORES`.

    A group is an image or a clip; at least one frame's worth of a clip runs. No candidates are what lies outside the
    picture (class tokens), positions with a loss of their own, and, where context runs only as far as targets read,
    what lies behind. An image that is cut by the longest row has a share of what is left of it.
    """

    def __init__(self, config: ReGateConfig) -> None:
        self.config = config

    def keep_ratio(self, number: int) -> float:
        """See :class:`CandidateSort`."""
        return self.config.visual_keep_ratio

    def where(self, facts: MicrobatchFacts) -> Tensor:
        """See :class:`CandidateSort`."""
        return masks.put(self._is_candidate_V(facts), facts.is_visual_BS, into=torch.zeros_like(facts.is_visual_BS))

    def groups(self, facts: MicrobatchFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`CandidateSort`."""
        media = facts.media
        count_I = torch.bincount(masks.take(media.medium_V, self._is_candidate_V(facts)), minlength=len(media.count_I))
        least_I = torch.zeros_like(count_I)
        if media.grid_I3 is not None:
            frames_I, height_I, width_I = media.grid_I3.unbind(dim=1)
            least_I = torch.where(frames_I > 1, height_I * width_I, least_I)
        return count_I, facts.planned_row_N[media.sample_I], least_I

    def score(self, step: Step) -> Tensor:
        """See :class:`CandidateSort`; no communication.

        Raises:
            ReGateError: the rule needs grids or pixels that a batch does not have.
        """
        facts, row = step.facts, VISUAL_SCORES[self.config.visual_score]
        chosen = [self._is_candidate_V(one) for one in facts]
        media = [one.media for one in facts]
        for one, is_candidate_V in zip(media, chosen, strict=True):
            missing = "no square cells" if row.needs_grid and one.grid_I3 is None else None
            missing = "no pixels in the batch" if row.needs_pixels and one.pixels is None else missing
            if missing and bool(is_candidate_V.any()):
                raise refuse(
                    flag("visual_score"),
                    given=f"{self.config.visual_score} for pictures with {missing}",
                    allowed="random, or pictures that the tower cuts into square cells, with their pixels",
                    change="it to random",
                )
        before = np.cumsum([0, *(len(one.count_I) for one in media)])
        place_V = [masks.take(*pair) for pair in zip((one.place_V for one in media), chosen, strict=True)]
        medium_V = [masks.take(*pair) for pair in zip((one.medium_V for one in media), chosen, strict=True)]

        def pixels(medium: int) -> np.ndarray:
            index = int(before.searchsorted(medium, side="right")) - 1
            return media[index].pixels(medium - int(before[index]))

        def keys() -> tuple[Tensor, Tensor]:
            key_X2 = [
                one.difficulty_key_N2[one.media.sample_I[own_X]] for one, own_X in zip(facts, medium_V, strict=True)
            ]
            places = [self._place_in_sample(*pair) for pair in zip(facts, chosen, strict=True)]
            return torch.cat(key_X2), torch.cat(places)

        def chance() -> np.ndarray:
            key_I2 = torch.cat([one.difficulty_key_N2[one.media.sample_I] for one in facts])
            return uniform_in_0_1(key_I2, _numbers(media), seed=self.config.seed, step=step.number).numpy()

        signals = VisualSignals(
            medium_X=np.concatenate([own.numpy() + start for own, start in zip(medium_V, before[:-1], strict=True)]),
            place_X=torch.cat(place_V).numpy(),
            grid_I3=np.concatenate([_grids(one) for one in media]),
            pixels=pixels,
            keys=keys,
            chance=chance,
            seed=self.config.seed,
            step=step.number,
        )
        return torch.from_numpy(row.of(signals))

    def _is_candidate_V(self, facts: MicrobatchFacts) -> Tensor:
        """Which visual positions may be left out; bool [V]."""
        is_candidate_V = facts.media.place_V >= 0
        if facts.has_visual_loss_BS is not None:
            is_candidate_V &= ~masks.take(facts.has_visual_loss_BS, facts.is_visual_BS)
        if self.config.context == "read":
            is_candidate_V &= masks.take(facts.is_read_BS, facts.is_visual_BS)
        return is_candidate_V

    @staticmethod
    def _place_in_sample(facts: MicrobatchFacts, is_candidate_V: Tensor) -> Tensor:
        """The place of each candidate in its sample; int64 [X]."""
        position_V = torch.from_numpy(facts.is_visual_BS.numpy().nonzero()[1])
        start_V = facts.start_N[facts.media.sample_I[facts.media.medium_V]]
        return masks.take(position_V - start_V, is_candidate_V)


def _grids(media: Media) -> np.ndarray:
    """Grids of media; all zero where they are not known."""
    return np.zeros((len(media.count_I), 3), np.int64) if media.grid_I3 is None else media.grid_I3.numpy()


def _numbers(media: Sequence[Media]) -> Tensor:
    """The number of each medium in its sample, from 0; int64 [I]."""
    numbers = [torch.arange(len(one.sample_I)) - torch.searchsorted(one.sample_I, one.sample_I) for one in media]
    return torch.cat(numbers)
