"""The student's difficulty: a running average of its own loss per sample and target, and a prior for new targets.

``m ← β·m + (1−β)·ℓ`` for every observed target; the first observation sets m. A target never seen gets the prior of its
token id: a running average, over dense steps, of the mean loss of targets with that id (one mean per id and step); ids
never seen get the running average of the mean over all targets. Dense steps only, or the prior would be biased to hard
tokens.

The records live on the planners, each key with one owner (key modulo data-parallel size), so that a sample may come
back on another rank in the next epoch; the prior is the same on all planners.

Shapes: R rows of this rank in a step, S positions, T targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.topology import Topology

Key = tuple[int, int]


class TokenPrior:
    """Running mean loss per target token id, shared by all planners."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean_V = torch.zeros(0, dtype=torch.float64)
        self.is_seen_V = torch.zeros(0, dtype=torch.bool)
        self.overall = 0.0
        self.any_seen = False

    def look_up(self, label_X: Tensor) -> Tensor:
        """The prior of each label; float64."""
        self._grow(int(label_X.max()) + 1 if label_X.numel() else 0)
        return torch.where(self.is_seen_V[label_X], self.mean_V[label_X], self.overall)

    def update(self, label_X: Tensor, loss_X: Tensor, topology: Topology) -> None:
        """Take in one dense step's targets of this rank; all planners call this, one sum over them.

        Args:
            label_X, loss_X: labels (int64) and losses (float64) of every target of this rank.
        """
        size = int(
            topology.all_reduce_planners(torch.tensor([int(label_X.max()) + 1 if label_X.numel() else 0]), "max")
        )
        size = max(size, len(self.mean_V))
        self._grow(size)
        totals_2V = torch.zeros(2, size, dtype=torch.float64)
        totals_2V[0].index_add_(0, label_X, loss_X)
        totals_2V[1].index_add_(0, label_X, torch.ones_like(loss_X))
        sum_V, count_V = topology.all_reduce_planners(totals_2V, "sum")
        present_V = count_V > 0
        if not present_V.any():
            return
        mean_V = sum_V / count_V.clamp_min(1)
        averaged_V = torch.where(self.is_seen_V, self.decay * self.mean_V + (1 - self.decay) * mean_V, mean_V)
        self.mean_V = torch.where(present_V, averaged_V, self.mean_V)
        self.is_seen_V |= present_V
        overall = float(sum_V.sum() / count_V.sum())
        self.overall = self.decay * self.overall + (1 - self.decay) * overall if self.any_seen else overall
        self.any_seen = True

    def _grow(self, size: int) -> None:
        missing = size - len(self.mean_V)
        if missing > 0:
            self.mean_V = torch.cat([self.mean_V, torch.zeros(missing, dtype=torch.float64)])
            self.is_seen_V = torch.cat([self.is_seen_V, torch.zeros(missing, dtype=torch.bool)])


class DifficultyStore:
    """m per sample and target, sharded by key over the planners.

    A row's record is one float32 per target, in the order of their positions; NaN where never observed.
    """

    def __init__(self, decay: float, topology: Topology) -> None:
        self.decay, self.topology = decay, topology
        self._records: dict[Key, Tensor] = {}

    def __len__(self) -> int:
        return len(self._records)

    def fetch(self, key_R2: Tensor, num_target_R: Tensor) -> list[Tensor]:
        """The records of this rank's rows, one float32 [T] per row; NaN where never observed.

        All planners call this, two exchanges over them.
        """
        asked, owner_R = self._route(key_R2, num_target_R)
        answers = []
        for rows_X3 in asked:
            records = [self._read((a, b), count) for a, b, count in rows_X3.tolist()]
            answers.append(torch.cat(records) if records else torch.empty(0))
        counts = [int(num_target_R[owner_R == rank].sum()) for rank in range(self.topology.dp_size)]
        flat_by_owner = _exchange(answers, self.topology, counts)
        return _split_rows(flat_by_owner, owner_R, num_target_R)

    def update(self, key_R2: Tensor, loss_by_row: Sequence[Tensor]) -> None:
        """Take in this step's losses: per row float32 [T], NaN where the target did not run.

        All planners call this, two exchanges over them. The same key in several rows is taken in one after the other,
        by rank and row.
        """
        num_target_R = torch.tensor([len(loss_T) for loss_T in loss_by_row], dtype=torch.int64)
        asked, owner_R = self._route(key_R2, num_target_R)
        sent = []
        for rank in range(self.topology.dp_size):
            mine = [loss_by_row[row] for row in torch.where(owner_R == rank)[0].tolist()]
            sent.append(torch.cat(mine) if mine else torch.empty(0))
        counts = [int(rows_X3[:, 2].sum()) for rows_X3 in asked]
        for rows_X3, flat in zip(asked, _exchange(sent, self.topology, counts), strict=True):
            keys = [(a, b) for a, b, _ in rows_X3.tolist()]
            for key, loss_T in zip(keys, flat.split(rows_X3[:, 2].tolist()), strict=True):
                self._take_in(key, loss_T)

    def _read(self, key: Key, count: int) -> Tensor:
        record_T = self._records.get(key)
        return record_T if record_T is not None and len(record_T) == count else torch.full((count,), torch.nan)

    def _take_in(self, key: Key, loss_T: Tensor) -> None:
        before_T = self._read(key, len(loss_T))
        first_T = before_T.isnan()
        after_T = torch.where(first_T, loss_T, self.decay * before_T + (1 - self.decay) * loss_T)
        self._records[key] = torch.where(loss_T.isfinite(), after_T, before_T)

    def _route(self, key_R2: Tensor, num_target_R: Tensor) -> tuple[list[Tensor], Tensor]:
        """Send (key, T) of each row to its owner; returns what each planner asks of this one [X, 3], and owners."""
        owner_R = key_R2[:, 0] % self.topology.dp_size
        rows_R3 = torch.cat([key_R2, num_target_R[:, None]], dim=1)
        sent = [rows_R3[owner_R == rank].reshape(-1) for rank in range(self.topology.dp_size)]
        return [flat.view(-1, 3) for flat in _exchange(sent, self.topology)], owner_R


def _split_rows(flat_by_owner: list[Tensor], owner_R: Tensor, num_target_R: Tensor) -> list[Tensor]:
    """Give every row its piece of what its owner sent, in row order."""
    pieces: list[Tensor] = [torch.empty(0)] * len(owner_R)
    for rank, flat in enumerate(flat_by_owner):
        rows = torch.where(owner_R == rank)[0]
        for row, piece in zip(rows.tolist(), flat.split(num_target_R[rows].tolist()), strict=True):
            pieces[row] = piece
    return pieces


def _exchange(sent: list[Tensor], topology: Topology, counts: list[int] | None = None) -> list[Tensor]:
    """All-to-all of one flat tensor per planner; ``counts`` are the lengths to expect, asked for when not known."""
    if topology.dp_size == 1:
        return sent
    sizes = [flat.numel() for flat in sent]
    if counts is None:
        count_D = torch.empty(topology.dp_size, dtype=torch.int64)
        dist.all_to_all_single(count_D, torch.tensor(sizes), group=topology.planner_group)
        counts = count_D.tolist()
    received = torch.empty(sum(counts), dtype=sent[0].dtype)
    dist.all_to_all_single(received, torch.cat(sent), counts, sizes, group=topology.planner_group)
    return list(received.split(counts))
