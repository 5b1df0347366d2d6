"""The sorts of candidates: where they are in a batch, which have a share of their own, how they are scored.

A sort is one class here. Budgets, selection and plans know candidates only (:mod:`regate_megatron.method.candidates`).

Shapes: B rows, S positions, G groups, X candidates of a microbatch or of the step, in order of groups and positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.config import ReGateConfig
from regate_megatron.memory.learned import Learned
from regate_megatron.method.schedule import keep_ratio_of
from regate_megatron.method.scores import SCORES, Signals
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
