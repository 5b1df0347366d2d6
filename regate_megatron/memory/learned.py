"""What a run learns of its data: the difficulty of each sample's targets, and the prior of targets never seen; or,
where difficulty is that of a kind of target, the means of kinds and nothing of single samples. And how strong the
gradients at each sample's visual positions are.

Gradients are kept as difficulty is, in the very same records, under keys of their own: bound, forgetting, saved state,
resume at another size are one for both.

One object per planner, which outlives steps; saved state takes it out and puts it back whole.

Shapes: N samples of this rank in a step, X their targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_megatron.memory.difficulty import DifficultyStore, TokenPrior
from regate_megatron.memory.kinds import KindMeans
from regate_megatron.memory.records import Records, RecordsSnapshot
from regate_megatron.ranks.topology import Topology

_OF_GRADIENTS = 0x5EE1_D6A1_0F6E_77AD  # what tells the key of a sample's gradients from that of its difficulty


class Learned:
    """Difficulty and prior on one planner.

    Args:
        decay: of both running averages.
        limit_bytes: host memory of the difficulty on each planner.
        by_kind: whether difficulty is that of a kind of target.
    """

    def __init__(self, decay: float, topology: Topology, limit_bytes: float, by_kind: bool = False) -> None:
        self.decay, self.topology = decay, topology
        self.difficulty = DifficultyStore(decay, topology, limit_bytes)
        self.gradients = DifficultyStore(decay, topology, limit_bytes)
        self.gradients.records = self.difficulty.records
        self._kind_of_prior = KindMeans if by_kind else TokenPrior
        self.prior = self.empty_prior()

    def __len__(self) -> int:
        return len(self.difficulty)

    def look_up(
        self, key_N2: Tensor, num_target_N: Tensor, label_X: Tensor, step: int, reference_X: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The difficulty of every target, float64 [X], and whether it is its own, bool [X]; else it is the prior's.

        All planners call this, over their group. By kind: its own is that of a kind that was seen.
        """
        if isinstance(self.prior, KindMeans):
            return self.prior.look_up(label_X, reference_X)
        prior_X = self.prior.look_up(label_X)
        own_X = self.difficulty.fetch(key_N2, num_target_N, step).double()
        is_known_X = ~own_X.isnan()
        return torch.where(is_known_X, own_X, prior_X), is_known_X

    def rows_moved(self) -> None:
        """The samples that were looked up in this step are on other planners now; all planners call this."""
        self.difficulty.forget_route()

    def take_in(
        self,
        key_N2: Tensor,
        num_target_N: Tensor,
        loss_X: Tensor,
        label_X: Tensor,
        *,
        step: int,
        is_dense: bool,
        reference_X: Tensor | None = None,
    ) -> None:
        """Learn from a step that counted; all planners call this, over their group.

        Args:
            loss_X: of the targets of one sample after the other, float32, NaN where a target did not run.
            label_X: their labels, int64.
            is_dense: whether all targets ran; else the prior learns nothing, as what ran was hard.
            reference_X: by kind, in a dense step: the teacher's losses, float64.
        """
        by_kind = isinstance(self.prior, KindMeans)
        if not by_kind:
            self.difficulty.update(key_N2, num_target_N, loss_X, step)
        if is_dense:
            loss_X = loss_X.double()
            is_finite_X = loss_X.isfinite()
            about = (label_X, reference_X) if by_kind else (label_X,)
            self.prior.update(*(values_X[is_finite_X] for values_X in (*about, loss_X)), self.topology)

    def look_up_gradients(self, key_N2: Tensor, count_N: Tensor, step: int) -> Tensor:
        """The running average of every visual candidate, float64 [X]; NaN where none was seen.

        All planners call this, over their group.

        Args:
            count_N: candidates of each sample, int64.
        """
        return self.gradients.fetch(_key_of_gradients(key_N2), count_N, step).double()

    def take_in_gradients(self, key_N2: Tensor, count_N: Tensor, relative_X: Tensor, step: int) -> None:
        """Learn from a dense step that counted; all planners call this, over their group.

        Args:
            relative_X: norms, relative to their mean over the sample, of one sample after the other, float32.
        """
        self.gradients.update(_key_of_gradients(key_N2), count_N, relative_X, step)

    def snapshot(self) -> RecordsSnapshot:
        """The difficulty as it is now, to be written while training goes on, until :meth:`release`."""
        return self.difficulty.records.snapshot()

    def release(self) -> None:
        """A snapshot is in use no more."""
        self.difficulty.records.release()

    def adopt(self, records: Records, prior: TokenPrior | KindMeans) -> None:
        """Go on with what was learned before."""
        self.difficulty.records = self.gradients.records = records
        self.prior = prior

    def empty_records(self) -> Records:
        """Records with this planner's bound, to be filled and adopted."""
        return Records(self.difficulty.records.limit_bytes)

    def empty_prior(self) -> TokenPrior | KindMeans:
        """A prior that knows nothing, of the sort that this run has."""
        return self._kind_of_prior(self.decay)

    def describe(self) -> str:
        """One line."""
        if isinstance(self.prior, KindMeans):
            return f"difficulty: {int((self.prior.totals_2C[1] > 0).sum()):,} kinds of targets seen"
        return self.difficulty.describe()


def _key_of_gradients(key_N2: Tensor) -> Tensor:
    """Keys with the same owner (who owns a record is told by the first half)."""
    return torch.stack([key_N2[:, 0], key_N2[:, 1] ^ _OF_GRADIENTS], dim=1)
