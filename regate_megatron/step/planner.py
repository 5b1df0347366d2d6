"""The planner, one per data-parallel replica: scores targets, keeps the best, learns from the student's losses.

Shapes: R rows of this rank in a step (all microbatches), N samples, S positions, K positions that run, X targets of a
microbatch, T of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.config import ReGateConfig
from regate_megatron.memory.difficulty import DifficultyStore, TokenPrior
from regate_megatron.method import masks, scores, selection
from regate_megatron.method.budget import Alignment, align_up
from regate_megatron.method.schedule import keep_ratio_of
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.metrics import Balance
from regate_megatron.step.plan import MicrobatchPlan, Packing, StepPlan


class Planner:
    """Plans steps and keeps what was learned.

    Args:
        config: the settings.
        topology: this rank is a planner in it.
        multiple: alignment of kept lengths that the layout needs.
        segment_multiple: alignment of the segments of packed rows that the layout needs.

    Attributes:
        balance: how the positions of the last sparse plan are spread over data-parallel ranks.
    """

    def __init__(self, config: ReGateConfig, topology: Topology, multiple: int, segment_multiple: int = 1) -> None:
        self.config, self.topology = config, topology
        self.multiple, self.segment_multiple = multiple, segment_multiple
        self.difficulty = DifficultyStore(config.ema_decay, topology, config.difficulty_memory * 1e9)
        self.prior = TokenPrior(config.ema_decay)
        self.balance: Balance | None = None

    def plan(
        self, step: int, facts: Sequence[MicrobatchFacts], reference: Sequence[Tensor] | None
    ) -> tuple[StepPlan, list[Tensor], bool]:
        """The plan of a sparse step; all planners call this, over the planners' group.

        Args:
            reference: per sample of the step the teacher's losses of its targets, float32 [T]; None without teacher.

        Returns:
            the plan (dense when any rank met a non-finite score), the scores per microbatch [X], and whether it fell
            back to dense.
        """
        self.balance = None
        score_X = self._scores(step, facts, reference)
        num_target_M = [one.num_targets for one in facts]
        scores = list(score_X.split(num_target_M))
        finite = bool(score_X.isfinite().all())
        if int(self.topology.all_reduce_planners(torch.tensor([int(not finite)]), "max")):
            return StepPlan(step), scores, True
        context = [self._context_that_runs(one) for one in facts]
        chosen = selection.select(
            self._rows(facts, context, score_X),
            kind=self.config.budget,
            keep_ratio=keep_ratio_of(step, self.config),
            alignment=Alignment(self.multiple, self.config.length_multiple),
            all_gather=self.topology.all_gather_planners,
        )
        kept = [
            masks.put(is_kept_X, one.is_target_BS, into=context_BS)
            for is_kept_X, one, context_BS in zip(chosen.is_kept_X.split(num_target_M), facts, context, strict=True)
        ]
        length_M = self._with_room_for_segments(facts, kept, chosen.length_M)
        microbatches = [
            MicrobatchPlan.of(kept_BS, length)
            if one.sample_BS is None
            else MicrobatchPlan.of_packed(kept_BS, self._packing(one, kept_BS, length))
            for one, kept_BS, length in zip(facts, kept, length_M.tolist(), strict=True)
        ]
        own = sum(one.keep_idx_BK.numel() for one in microbatches)
        positions_D1 = self.topology.all_gather_planners(torch.tensor([own]))
        self.balance = Balance(int(positions_D1.max()), own, float(positions_D1.double().mean()), chosen.achievable)
        return StepPlan(step, tuple(microbatches)), scores, False

    def _context_that_runs(self, facts: MicrobatchFacts) -> Tensor:
        if self.config.context == "all":
            return facts.is_context_BS
        return facts.is_context_BS & selection.read_by_targets(facts.is_target_BS, facts.sample_BS)

    def _with_room_for_segments(
        self, facts: Sequence[MicrobatchFacts], kept: Sequence[Tensor], length_M: Tensor
    ) -> Tensor:
        """Lengths in which every segment of a packed row has the slots that context parallelism cuts; [M].

        What that adds is fill, so that every layout keeps the same targets. All planners call this; with context
        parallelism and one length for all they communicate, once.
        """
        if self.segment_multiple == 1:
            return length_M
        need_M = length_M.clone()
        for index, (one, kept_BS) in enumerate(zip(facts, kept, strict=True)):
            if one.sample_BS is not None and not one.joins_rows:
                need_M[index] = align_up(int(self._slots(one, kept_BS).sum()), self.multiple)
        if self.config.budget == "uniform":
            need_M = self.topology.all_gather_planners(need_M.amax().reshape(1)).amax().expand_as(need_M)
        dense_M = torch.tensor([one.planned_length for one in facts])
        return torch.minimum(torch.maximum(length_M, need_M), dense_M)

    def _slots(self, facts: MicrobatchFacts, kept_BS: Tensor) -> Tensor:
        """The least slots of each segment; [N]."""
        return -(-facts.count_by_sample(kept_BS) // self.segment_multiple) * self.segment_multiple

    def _packing(self, facts: MicrobatchFacts, kept_BS: Tensor, length: int) -> Packing:
        """The segments of a packed row; the last one takes what is left of the row."""
        if facts.joins_rows:
            return Packing(facts.segment_length_N, torch.full((facts.num_samples,), length))
        slots_N = self._slots(facts, kept_BS)
        slots_N[-1] += length - int(slots_N.sum())
        return Packing(facts.segment_length_N, slots_N)

    def _rows(self, facts: Sequence[MicrobatchFacts], context: Sequence[Tensor], score_X: Tensor) -> selection.Rows:
        """The step's rows with their groups: samples, or whole rows where a packed row counts as one."""
        if self.config.packed_ratio == "row":
            num_target_G = torch.cat([one.count_by_row(one.is_target_BS) for one in facts])
            row_G = torch.arange(len(num_target_G))
        else:
            rows = int(facts[0].planned_row_N[-1]) + 1
            num_target_G = torch.cat([one.num_target_N for one in facts])
            row_G = torch.cat([one.planned_row_N + index * rows for index, one in enumerate(facts)])
        return selection.Rows(
            num_context_R=torch.cat([one.count_by_row(c) for one, c in zip(facts, context, strict=True)]),
            num_target_G=num_target_G,
            row_G=row_G,
            dense_M=torch.tensor([one.planned_length for one in facts]),
            key_M=torch.stack([one.difficulty_key_N2[0, 0] for one in facts]),
            score_X=score_X,
        )

    def learn(
        self, facts: Sequence[MicrobatchFacts], plan: StepPlan, losses: Sequence[Tensor], *, is_dense: bool
    ) -> None:
        """Take in the student's losses of a step that counted; all planners call this, over their group.

        Args:
            losses: per microbatch float [B, S], on the CPU.
            is_dense: whether every target ran; only then the prior learns.
        """
        losses_M, losses_N = [], []
        for index, (one, loss_BS) in enumerate(zip(facts, losses, strict=True)):
            loss_X = masks.take(loss_BS.float(), one.is_target_BS)
            if not is_dense:
                kept_X = masks.take(plan.microbatches[index].kept_mask(), one.is_target_BS)
                loss_X = loss_X.masked_fill(~kept_X, torch.nan)
            losses_M.append(loss_X)
            losses_N += loss_X.split(one.num_target_N.tolist())
        self.difficulty.update(torch.cat([one.difficulty_key_N2 for one in facts]), losses_N, plan.step)
        if is_dense:
            label_X, loss_X = torch.cat([one.label_X for one in facts]), torch.cat(losses_M).double()
            finite_X = loss_X.isfinite()
            self.prior.update(label_X[finite_X], loss_X[finite_X], self.topology)

    def _scores(self, step: int, facts: Sequence[MicrobatchFacts], reference: Sequence[Tensor] | None) -> Tensor:
        """The score of every target of the step, microbatch by microbatch; float64 [X]."""
        key_N2 = torch.cat([one.difficulty_key_N2 for one in facts])
        num_target_N = torch.cat([one.num_target_N for one in facts])
        if self.config.score == "random":
            key_X2 = key_N2.repeat_interleave(num_target_N, dim=0)
            place_X = torch.cat([one.place_X for one in facts])
            return scores.random_score(key_X2, place_X, seed=self.config.seed, step=step)
        prior_X = self.prior.look_up(torch.cat([one.label_X for one in facts]))
        if self.config.learns:
            known_X = torch.cat(self.difficulty.fetch(key_N2, num_target_N, step)).double()
            prior_X = torch.where(known_X.isnan(), prior_X, known_X)
        return scores.fuse(
            prior_X,
            torch.cat(list(reference)) if reference is not None else None,
            score=self.config.score,
            fusion=self.config.fusion,
            reference_weight=self.config.reference_weight,
        )
