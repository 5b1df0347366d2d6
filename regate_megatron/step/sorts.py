"""The sorts of candidates: where they are in a batch, which have a share of their own, how they are scored.

A sort is one class here. Budgets, selection and plans know candidates only (:mod:`regate_megatron.method.candidates`).

Shapes: P positions of a step, G groups, X candidates, in order of groups and positions; V visual positions, I images
and clips (media) of the step.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches import StepFacts
from regate_megatron.config import ReGateConfig, flag
from regate_megatron.errors import refuse
from regate_megatron.memory.learned import Learned
from regate_megatron.method import masks
from regate_megatron.method.candidates import ceil_share
from regate_megatron.method.chance import uniform_in_0_1
from regate_megatron.method.scores import SCORES, Signals
from regate_megatron.method.threshold import above_threshold
from regate_megatron.method.visual_scores import VISUAL_SCORES, VisualSignals
from regate_megatron.step.step import Step


class CandidateSort(Protocol):
    """One sort of candidates."""

    def keep_ratio(self, number: int) -> float:
        """p in step ``number``; 1.0: all of them run, and they are no candidates."""
        ...

    def where(self, facts: StepFacts) -> Tensor:
        """The candidates; bool [P]."""
        ...

    def groups(self, facts: StepFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """Per group the number of candidates, the row of the step it is planned in, the fewest that run; int64 [G]."""
        ...

    def check(self, facts: StepFacts) -> None:
        """Refuse batches that lack what the score of this run needs, be the step sparse or not; no communication.

        Raises:
            ReGateError: they do.
        """
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
        return self.config.keep_ratio_in(number)

    def where(self, facts: StepFacts) -> Tensor:
        """See :class:`CandidateSort`."""
        return facts.is_target_P

    def groups(self, facts: StepFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`CandidateSort`."""
        if self.config.packed_ratio == "row":
            count_R = facts.count_by_row(facts.is_target_P)
            return count_R, torch.arange(len(count_R)), None
        return facts.num_target_N, facts.planned_row_N, None

    def check(self, facts: StepFacts) -> None:
        """See :class:`CandidateSort`; any batch will do."""

    def score(self, step: Step) -> Tensor:
        """See :class:`CandidateSort`; communicates where difficulty is asked for, and notes which targets have one."""
        facts, row = step.whole, SCORES[self.config.score]
        reference_X = torch.cat(list(step.reference)).double() if self.config.needs_teacher else None
        difficulty_X = None
        if row.needs_difficulty:
            difficulty_X, is_known_X = self.learned.look_up(
                facts.key_N2, facts.num_target_N, facts.label_X, step.number, reference_X
            )
            step.is_known = is_known_X.split(facts.num_target_M)
        signals = Signals(
            difficulty_X=difficulty_X,
            reference_X=reference_X,
            reference_weight=self.config.reference_weight,
            fusion=self.config.fusion,
            keys=lambda: (facts.key_N2, facts.place_X, facts.num_target_N),
            seed=self.config.seed,
            step=step.number,
        )
        return row.of(signals)

    def above_threshold(self, step: Step, score_X: Tensor) -> Tensor:
        """Which targets run where the keep ratio is a share of the global batch; bool [X].

        All planners call this, over their group: a few small sums.
        """
        facts, topology = step.whole, self.learned.topology
        count_G, row_G, _ = self.groups(facts)
        num_micro = len(facts.microbatches)
        first_G = torch.searchsorted(facts.planned_row_N, row_G) if self.config.packed_ratio == "row" else slice(None)
        micro_G = row_G * num_micro // (int(row_G[-1]) + 1)
        number_G = torch.arange(len(row_G)) - torch.searchsorted(micro_G, micro_G)
        return above_threshold(
            score_X,
            count_G,
            ceil_share(self.keep_ratio(step.number), count_G, 2),
            key_G2=facts.key_N2[first_G],
            order_G=((micro_G * topology.dp_size + topology.dp_rank) << 24) + number_G,
            keep_ratio=self.keep_ratio(step.number),
            least_score=self.config.least_score,
            sum_over_planners=lambda values: topology.all_reduce_planners(values, "sum"),
        )


class Visual:
    """Visual positions, ranked by a row of :data:`~regate_megatron.method.visual_scores.VISUAL_SCORES`.

    A group is an image or a clip; at least one frame's worth of a clip runs. No candidates are what lies outside the
    picture (class tokens), positions with a loss of their own, and, where context runs only as far as targets read,
    what lies behind. An image that is cut by the longest row has a share of what is left of it.
    """

    def __init__(self, config: ReGateConfig, learned: Learned) -> None:
        self.config, self.learned = config, learned

    def keep_ratio(self, number: int) -> float:
        """See :class:`CandidateSort`."""
        return self.config.visual_keep_ratio_in(number)

    def where(self, facts: StepFacts) -> Tensor:
        """See :class:`CandidateSort`."""
        return masks.put(self._may_go_V(facts), facts.is_visual_P, into=torch.zeros_like(facts.is_visual_P))

    def groups(self, facts: StepFacts) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`CandidateSort`."""
        frames_I, height_I, width_I = torch.from_numpy(facts.grid_I3).unbind(dim=1)
        least_I = torch.where(frames_I > 1, height_I * width_I, 0)
        return self._count_I(facts), facts.planned_row_N[facts.sample_I], least_I

    def check(self, facts: StepFacts) -> None:
        """See :class:`CandidateSort`: the rule may need pixels."""
        if not (self.config.ranks_visual and VISUAL_SCORES[self.config.visual_score].needs_pixels):
            return
        if any(one.pixels is None and bool(one.count_I.any()) for one in facts.media):
            raise refuse(
                flag("visual_score"),
                given=f"{self.config.visual_score} for pictures without pixels in the batch, or in no square cells",
                allowed="even, random, or pictures that the tower cuts into square cells, with their pixels",
                change="it to even",
            )

    def score(self, step: Step) -> Tensor:
        """See :class:`CandidateSort`; communicates where gradients are asked for, and notes which are known."""
        facts, row = step.whole, VISUAL_SCORES[self.config.visual_score]
        may_go_V, count_I = self._may_go_V(facts), self._count_I(facts)
        before = np.cumsum([0, *(len(one.count_I) for one in facts.media)])
        gradient_X = None
        if row.needs_gradient:
            count_N = self._count_N(facts)
            gradient_X = self.learned.look_up_gradients(facts.key_N2, count_N, step.number).numpy()
            step.is_visual_known = torch.from_numpy(~np.isnan(gradient_X))

        def pixels(medium: int) -> np.ndarray:
            index = int(before.searchsorted(medium, side="right")) - 1
            return facts.media[index].pixels(medium - int(before[index]))

        def keys() -> tuple[Tensor, ...]:
            return facts.key_N2[facts.sample_I], masks.take(facts.place_in_sample_V(), may_go_V), count_I

        def chance() -> np.ndarray:
            key_I2 = facts.key_N2[facts.sample_I]
            return uniform_in_0_1(key_I2, facts.number_I, seed=self.config.seed, step=step.number).numpy()

        signals = VisualSignals(
            medium_X=masks.take(facts.medium_V, may_go_V).numpy(),
            place_X=masks.take(facts.place_V, may_go_V).numpy(),
            grid_I3=facts.grid_I3,
            pixels=pixels,
            keys=keys,
            chance=chance,
            gradient_X=gradient_X,
            seed=self.config.seed,
            step=step.number,
        )
        return torch.from_numpy(row.of(signals))

    def learn(self, facts: StepFacts, norm_P: Tensor, number: int) -> None:
        """Take in how strong the gradient was at every position of dense step ``number``; all planners call this.

        What is kept is relative to the mean over the candidates of a sample: however a loss is scaled, 1 is as strong
        as they are on average.
        """
        norm_X = masks.take(masks.take(norm_P, facts.is_visual_P), self._may_go_V(facts)).double()
        count_N = self._count_N(facts)
        sample_X = torch.arange(len(count_N)).repeat_interleave(count_N)
        sum_N = torch.zeros(len(count_N), dtype=torch.float64).index_add_(0, sample_X, norm_X)
        relative_X = norm_X * (count_N / sum_N)[sample_X]  # no number where no gradient came at all: nothing is learned
        self.learned.take_in_gradients(facts.key_N2, count_N, relative_X.float(), number)

    def _count_N(self, facts: StepFacts) -> Tensor:
        """Candidates of each sample; int64."""
        return torch.zeros(len(facts.key_N2), dtype=torch.int64).index_add_(0, facts.sample_I, self._count_I(facts))

    def _may_go_V(self, facts: StepFacts) -> Tensor:
        """Which visual positions may be left out; bool [V]."""
        if self.config.context == "all":
            return facts.may_go_V
        return facts.may_go_V & masks.take(facts.is_read_P, facts.is_visual_P)

    def _count_I(self, facts: StepFacts) -> Tensor:
        """Candidates of each medium; int64."""
        going_X, end_I = self._may_go_V(facts).numpy().nonzero()[0], facts.count_I.cumsum(0).numpy()
        return torch.from_numpy(np.diff(going_X.searchsorted(end_I), prepend=0))
