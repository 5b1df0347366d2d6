"""The planner, one per data-parallel replica: scores candidates, keeps the best, learns from the student's losses.

Shapes: R rows of this rank in a step (all microbatches), N samples, P positions, X candidates; a microbatch has B rows
of S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts, StepFacts
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import refuse
from regate_megatron.memory.learned import Learned
from regate_megatron.method import budget, masks, selection
from regate_megatron.method.budget import Alignment, align_up
from regate_megatron.method.candidates import Candidates, Sort
from regate_megatron.method.plan import Packing, StepPlan, plan_each
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.sorts import CandidateSort, Targets, Visual
from regate_megatron.step.step import Balance, Step


class Planner:
    """Plans steps and keeps what was learned.

    Args:
        config: the settings.
        topology: this rank is a planner in it.
        multiple: alignment of kept lengths that the layout needs.
        segment_multiple: alignment of the segments of packed rows that the layout needs.
        evens_columns: whether under ``dealt`` a microbatch is as long on every rank, filled up to the longest.

    Attributes:
        learned: what outlives steps.
        visual: that of visual positions.
        sorts: all sorts of candidates; targets come first.
    """

    def __init__(
        self,
        config: ReGateConfig,
        topology: Topology,
        multiple: int,
        segment_multiple: int = 1,
        evens_columns: bool = False,
    ) -> None:
        self.config, self.topology = config, topology
        self.multiple, self.segment_multiple, self.evens_columns = multiple, segment_multiple, evens_columns
        self.learned = Learned(config.ema_decay, topology, config.difficulty_memory * 1e9, config.by_kind)
        self.visual = Visual(config, self.learned)
        self.sorts: tuple[CandidateSort, ...] = (Targets(config, self.learned), self.visual)

    def check(self, facts: StepFacts) -> None:
        """Refuse batches that lack what the scores of this run need, be the step sparse or not; no communication.

        Raises:
            ReGateError: they do.
        """
        for sort in self.sorts:
            sort.check(facts)

    def plan(self, step: Step) -> None:
        """Plan a sparse step: fills its scores, plan, fallback and balance. All planners call this, over their group.

        Needs its facts, and reference losses where the score does; scores that are known stay. Where any rank met a
        score that is no number the plan stays dense, on all ranks.
        """
        facts, sorts = step.whole, self._sorts(step.number)
        scores = [self._score(step, sort) for sort in sorts]
        finite = all(bool(score_X.isfinite().all()) for score_X in scores)
        if not finite:  # the others cannot tell until all meet below
            scores = [torch.zeros_like(score_X) for score_X in scores]
        if self._shares_batch(step) and step.above is None:
            self._find_threshold(step)
        where = [sort.where(facts) for sort in sorts]
        kept_P = self._always(facts, where)
        candidates = self._candidates(step, kept_P, sorts, scores)
        chosen = selection.select(
            candidates,
            kind=self.config.budget,
            alignment=self._alignment,
            all_gather=self.topology.all_gather_planners,
        )
        for where_P, is_kept_X in zip(where, candidates.by_sort(chosen.is_kept_X), strict=True):
            kept_P = masks.put(is_kept_X, where_P, into=kept_P)
        kept = [
            kept_Y.view_as(one.is_target_BS)
            for kept_Y, one in zip(kept_P.split(facts.sizes), facts.microbatches, strict=True)
        ]
        length_M = self._with_room_for_segments(facts.microbatches, kept, chosen.length_M)
        if self.evens_columns:
            length_M = self._as_long_on_every_rank(length_M, candidates.dense_M)
        slots = [
            length if one.sample_BS is None else self._packing(one, kept_BS, length)
            for one, kept_BS, length in zip(facts.microbatches, kept, length_M.tolist(), strict=True)
        ]
        microbatches = plan_each(kept, slots)
        own = sum(one.keep_idx_BK.numel() for one in microbatches)
        own_3 = torch.tensor([own, sum(facts.sizes), int(finite)])
        run_D, dense_D, is_finite_D = self.topology.all_gather_planners(own_3).unbind(dim=1)
        if not bool(is_finite_D.all()):
            step.fallback = True
            return
        achievable = step.at_best if self.config.budget == "dealt" else chosen.achievable
        mean = float(run_D.double().mean())
        step.balance = Balance(int(run_D.max()), own, mean, achievable, int(dense_D.max()))
        step.plan = StepPlan(step.number, tuple(microbatches))

    def asked(self, step: Step) -> tuple[Tensor, Tensor]:
        """The positions that each microbatch asks for (all, in a dense step), and its content key; int64 [M] each.

        They follow from counts alone, before anything is scored and without communication. Unless the keep ratio is a
        share of the batch: then all planners call this, over their group, and the targets are scored here.
        """
        if not step.elides:
            return torch.tensor(step.whole.sizes), step.whole.key_M
        sorts = self._sorts(step.number)
        if self._shares_batch(step):
            self._score(step, sorts[0])
            self._find_threshold(step)
        always_P = self._always(step.whole, [sort.where(step.whole) for sort in sorts])
        candidates = self._candidates(step, always_P, sorts, [None] * len(sorts))
        length_M, _ = budget.per_sample_lengths(candidates, self._alignment)
        return length_M * candidates.rows, candidates.key_M

    def follow(self, step: Step, from_DM: np.ndarray) -> None:
        """Give what :meth:`asked` found of the targets to the planners whose ranks got them; nothing where it found
        none. All planners call this, over their group, once they have read what they got.

        Args:
            from_DM: what each place got, as rank · M + number at home.
        """
        if step.scores is None:
            return
        self.learned.rows_moved()
        step.reference = None  # of the rows that were here
        found = {name: getattr(step, name) for name in ("scores", "above", "is_known")}
        found = {name: each for name, each in found.items() if each is not None}
        home = [torch.stack([one.double() for one in parts], dim=1) for parts in zip(*found.values(), strict=True)]
        rank, num_micro = self.topology.dp_rank, from_DM.shape[1]
        sent = [[home[at - rank * num_micro] for at in to_M.tolist() if at // num_micro == rank] for to_M in from_DM]
        send_D = torch.tensor([sum(map(len, parts)) for parts in sent])
        came_Xx, _ = self.topology.exchange_planners(torch.cat([one for parts in sent for one in parts]), send_D)
        places = np.argsort(from_DM[rank] // num_micro, kind="stable").tolist()  # what came lies by where it is from
        came = dict(zip(places, came_Xx.split([step.whole.num_target_M[at] for at in places]), strict=True))
        for index, (name, each) in enumerate(found.items()):
            setattr(step, name, [came[at][:, index].to(each[0].dtype) for at in range(num_micro)])

    def learn(self, step: Step, losses: Sequence[Tensor], norm_P: Tensor | None) -> None:
        """Take in what a step that counted has shown; all planners call this, over their group.

        Args:
            losses: the student's, per microbatch float [B, S], on the CPU.
            norm_P: of the gradient at every position, float32, on the CPU; None in steps that are not watched.
        """
        facts = step.whole
        if norm_P is not None:
            self.visual.learn(facts, norm_P, step.number)
        if not self.config.learns_losses:
            return
        loss_X = masks.take(torch.cat([loss_BS.reshape(-1) for loss_BS in losses]).float(), facts.is_target_P)
        if step.plan.is_sparse:
            loss_X = loss_X.masked_fill(~masks.take(step.plan.kept_P, facts.is_target_P), torch.nan)
        is_dense = not (step.plan.is_sparse and self.sorts[0].keep_ratio(step.number) < 1.0)
        by_kind = is_dense and self.config.by_kind
        if by_kind and step.reference is None:  # it fell back after its rows were dealt by their scores
            is_dense = by_kind = False
        self.learned.take_in(
            facts.key_N2,
            facts.num_target_N,
            loss_X,
            facts.label_X,
            step=step.number,
            is_dense=is_dense,
            reference_X=torch.cat(list(step.reference)).double() if by_kind else None,
        )

    @property
    def _alignment(self) -> Alignment:
        return Alignment(self.multiple, self.config.length_multiple)

    def _shares_batch(self, step: Step) -> bool:
        return self.config.share == "batch" and step.ranks_targets

    @staticmethod
    def _score(step: Step, sort: CandidateSort) -> Tensor:
        """Scores of all candidates of a sort; those of targets are known from before where their rows were dealt."""
        if not isinstance(sort, Targets):
            return sort.score(step)
        if step.scores is None:
            step.scores = sort.score(step).split(step.whole.num_target_M)
        return torch.cat(list(step.scores))

    def _find_threshold(self, step: Step) -> None:
        score_X = torch.cat(list(step.scores))
        if not bool(score_X.isfinite().all()):  # the step will run dense; nobody knows but this planner
            score_X = torch.zeros_like(score_X)
        above_X = self.sorts[0].above_threshold(step, score_X)
        step.above = above_X.split(step.whole.num_target_M)

    def _sorts(self, number: int) -> list[CandidateSort]:
        """The sorts of which step ``number`` leaves any out."""
        return [sort for sort in self.sorts if sort.keep_ratio(number) < 1.0]

    def _always(self, facts: StepFacts, candidates: Sequence[Tensor]) -> Tensor:
        """What is no padding and no candidate; with ``context="read"`` only what targets can read; bool [P]."""
        always_P = facts.is_real_P
        for is_candidate_P in candidates:
            always_P = always_P & ~is_candidate_P
        return always_P if self.config.context == "all" else always_P & facts.is_read_P

    @staticmethod
    def _candidates(
        step: Step, always_P: Tensor, sorts: Sequence[CandidateSort], scores: Sequence[Tensor | None]
    ) -> Candidates:
        """The step's rows with their groups."""
        facts, found = step.whole, []
        for sort, score_X in zip(sorts, scores, strict=True):
            count_G, row_G, least_G = sort.groups(facts)
            asked_G = None
            if isinstance(sort, Targets) and step.above is not None:
                group_X = torch.arange(len(count_G)).repeat_interleave(count_G)
                asked_G = torch.bincount(group_X[torch.cat(list(step.above))], minlength=len(count_G))
            groups = {"count_G": count_G, "row_G": row_G, "least_G": least_G, "asked_G": asked_G}
            found.append(Sort(**groups, keep_ratio=sort.keep_ratio(step.number), score_X=score_X))
        return Candidates(
            always_R=facts.count_by_row(always_P),
            dense_M=torch.tensor([one.planned_length for one in facts.microbatches]),
            key_M=facts.key_M,
            sorts=tuple(found),
        )

    def _with_room_for_segments(
        self, facts: Sequence[MicrobatchFacts], kept: Sequence[Tensor], length_M: Tensor
    ) -> Tensor:
        """Lengths in which every segment of a packed row has the slots that context parallelism cuts; [M].

        What that adds is fill, so that every layout keeps the same positions. All planners call this; with context
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

    def _as_long_on_every_rank(self, length_M: Tensor, dense_M: Tensor) -> Tensor:
        """The longest of all ranks, microbatch by microbatch; all planners call this, over their group.

        Raises:
            ReGateError: a microbatch is shorter than that before anything is left out.
        """
        longest_M = self.topology.all_gather_planners(length_M).amax(dim=0)
        if bool((longest_M > dense_M).any()):
            raise refuse(
                "experts shared over replicas by allgather",
                given=f"microbatches of {dense_M.tolist()} positions beside others of {longest_M.tolist()}",
                allowed="microbatches of one length on all ranks before tokens are left out",
                change="--moe-token-dispatcher-type to alltoall, or the data loader's padding",
            )
        return longest_M

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
