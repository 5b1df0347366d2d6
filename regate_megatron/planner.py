"""The planner, one per data-parallel replica: scores targets, keeps the best, learns from the student's losses.

Shapes: R rows of this rank in a step (all microbatches), N samples, S positions, K positions that run, X targets of a
microbatch, T of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regate_megatron import budget, scoring, selection
from regate_megatron.batches import MicrobatchFacts
from regate_megatron.config import ReGateConfig
from regate_megatron.difficulty import DifficultyStore, TokenPrior
from regate_megatron.plan import MicrobatchPlan, StepPlan
from regate_megatron.topology import Topology


class Planner:
    """Plans steps and keeps what was learned.

    Args:
        config: the settings.
        topology: this rank is a planner in it.
        multiple: alignment of kept lengths that the layout needs.
    """

    def __init__(self, config: ReGateConfig, topology: Topology, multiple: int) -> None:
        self.config, self.topology, self.multiple = config, topology, multiple
        self.difficulty = DifficultyStore(config.ema_decay, topology, config.difficulty_memory * 1e9)
        self.prior = TokenPrior(config.ema_decay)

    def plan(
        self, step: int, facts: Sequence[MicrobatchFacts], reference: Sequence[Tensor] | None
    ) -> tuple[StepPlan, list[Tensor], bool]:
        """The plan of a sparse step; all planners call this, over the planners' group.

        Args:
            reference: per sample of the step the teacher's losses of its targets, float32 [T]; None without teacher.

        Returns:
            the plan (dense when any rank met a non-finite score), the scores per microbatch [B, S], and whether it
            fell back to dense.
        """
        scores = self._scores(step, facts, reference)
        finite = all(bool(s[f.is_target_BS].isfinite().all()) for s, f in zip(scores, facts, strict=True))
        if int(self.topology.all_reduce_planners(torch.tensor([int(not finite)]), "max")):
            return StepPlan(step), scores, True
        allowance = budget.plan_budget(
            torch.cat([f.is_context_BS.sum(dim=1) for f in facts]),
            torch.cat([f.is_target_BS.sum(dim=1) for f in facts]),
            torch.tensor([f.dense_length for f in facts for _ in f.is_target_BS]),
            kind=self.config.budget,
            keep_ratio=self.config.keep_ratio,
            multiple=self.multiple,
            extra_multiple=self.config.length_multiple,
            rows_per_microbatch=len(facts[0].is_target_BS),
            all_reduce=self.topology.all_reduce_planners,
        )
        microbatches, row = [], 0
        for one, score_BS in zip(facts, scores, strict=True):
            rows = slice(row, row + len(score_BS))
            row = rows.stop
            kept_BS = selection.keep_best_targets(score_BS, one.is_target_BS, allowance.num_keep_R[rows])
            length = int(allowance.length_R[rows][0])
            keep_idx_BK, num_kept_B = selection.pack_positions(kept_BS | one.is_context_BS, length)
            microbatches.append(MicrobatchPlan(one.dense_length, keep_idx_BK, num_kept_B))
        return StepPlan(step, tuple(microbatches)), scores, False

    def learn(
        self, facts: Sequence[MicrobatchFacts], plan: StepPlan, losses: Sequence[Tensor], *, is_dense: bool
    ) -> None:
        """Take in the student's losses of a step that counted; all planners call this, over their group.

        Args:
            losses: per microbatch float [B, S], on the CPU.
            is_dense: whether every target ran; only then the prior learns.
        """
        losses_N, labels, values = [], [], []
        for index, (one, loss_BS) in enumerate(zip(facts, losses, strict=True)):
            loss_BS = loss_BS.float()
            if not is_dense:
                loss_BS = loss_BS.masked_fill(~plan.microbatches[index].kept_mask(), torch.nan)
            loss_X = loss_BS[one.is_target_BS]
            losses_N += loss_X.split(one.num_target_N.tolist())
            labels.append(one.label_BS[one.is_target_BS])
            values.append(loss_X.double())
        self.difficulty.update(torch.cat([one.difficulty_key_N2 for one in facts]), losses_N, plan.step)
        if is_dense:
            label_X, loss_X = torch.cat(labels), torch.cat(values)
            finite_X = loss_X.isfinite()
            self.prior.update(label_X[finite_X], loss_X[finite_X], self.topology)

    def _scores(self, step: int, facts: Sequence[MicrobatchFacts], reference: Sequence[Tensor] | None) -> list[Tensor]:
        if self.config.score == "random":
            return [
                _scatter(
                    scoring.random_score(f.difficulty_key_N2[f.sample_X], f.place_X, seed=self.config.seed, step=step),
                    f.is_target_BS,
                )
                for f in facts
            ]
        num_target_N = torch.cat([f.num_target_N for f in facts])
        if self.config.learns:
            records = self.difficulty.fetch(torch.cat([f.difficulty_key_N2 for f in facts]), num_target_N, step)
        else:
            records = [torch.full((count,), torch.nan) for count in num_target_N.tolist()]
        scores, sample = [], 0
        for one in facts:
            own = slice(sample, sample + one.num_samples)
            sample = own.stop
            known_X = torch.cat(records[own]).double()
            prior_X = self.prior.look_up(one.label_BS[one.is_target_BS])
            score_X = scoring.fuse(
                torch.where(known_X.isnan(), prior_X, known_X),
                torch.cat(reference[own]) if reference is not None else None,
                score=self.config.score,
                fusion=self.config.fusion,
                reference_weight=self.config.reference_weight,
            )
            scores.append(_scatter(score_X, one.is_target_BS))
        return scores


def _scatter(value_X: Tensor, is_target_BS: Tensor) -> Tensor:
    """Values of the targets, row by row, at their places; float64 [B, S]."""
    value_BS = torch.zeros(is_target_BS.shape, dtype=torch.float64)
    value_BS[is_target_BS] = value_X.double()
    return value_BS
