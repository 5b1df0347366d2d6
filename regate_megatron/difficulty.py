"""The student's difficulty: a running average of its own loss per sample and target, and a prior for new targets.

``m ← β·m + (1−β)·ℓ`` for every observed target; the first observation sets m. A target never seen gets the prior of its
token id: a running average, over dense steps, of the mean loss of targets with that id (one mean per id and step); ids
never seen get the running average of the mean over all targets. Dense steps only, or the prior would be biased to hard
tokens.

The records live on the planners, each key with one owner (key modulo data-parallel size), so that a sample may come
back on another rank in the next epoch; the prior is the same on all planners.

m is kept as float16: losses of 0 to 20 lie well inside its range, and of 16-bit formats it has the finer steps. A
running average that is rounded stops short of its goal: m no longer moves once ``|ℓ − m| < ulp(m) / (2·(1−β))``. With
β = 0.9 that is at most 0.5 % of m (0.01 at m between 2 and 4); bfloat16 would stop at 4 % (0.08). With β = 0.99 it is
5 % in float16.

Shapes: N samples of this rank in a step, T targets of a sample, D planners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.records import Records
from regate_megatron.topology import Topology


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


@dataclass(frozen=True)
class _Route:
    """Who asks whom for what in one step: what fetching learns of it, the update of the same step uses again.

    Attributes:
        owner_N: the planner that owns each of this rank's samples.
        asked_DX3: per planner, the (key, T) of its samples that this planner owns.
    """

    step: int
    owner_N: Tensor
    asked_DX3: list[Tensor]


class DifficultyStore:
    """m per sample and target, sharded by key over the planners.

    A sample's record is one number per target, in the order of their positions; NaN where never observed.

    Args:
        decay: β.
        limit_bytes: host memory of the records on each planner; see :mod:`regate_megatron.records`.
    """

    def __init__(self, decay: float, topology: Topology, limit_bytes: float) -> None:
        self.decay, self.topology = decay, topology
        self.records = Records(limit_bytes)
        self._route: _Route | None = None

    def __len__(self) -> int:
        return len(self.records)

    def fetch(self, key_N2: Tensor, num_target_N: Tensor, step: int) -> list[Tensor]:
        """The records of this rank's samples, one float32 [T] per sample; NaN where never observed.

        All planners call this, over their group: one small exchange of keys, one of records.
        """
        self._route = self._make_route(key_N2, num_target_N, step)
        answers = []
        for rows_X3 in self._route.asked_DX3:
            value_X = self.records.read(rows_X3[:, :2].numpy(), rows_X3[:, 2].numpy())
            answers.append(torch.from_numpy(value_X.astype(np.float32)))
        owner_N = self._route.owner_N
        counts = [int(num_target_N[owner_N == rank].sum()) for rank in range(self.topology.dp_size)]
        return _split_samples(_exchange(answers, self.topology, counts), owner_N, num_target_N)

    def update(self, key_N2: Tensor, losses: Sequence[Tensor], step: int) -> None:
        """Take in this step's losses: per sample float32 [T], NaN where the target did not run.

        All planners call this, over their group: one exchange of losses, and one of keys unless the same step was
        fetched before. The same key in several rows is taken in one after the other, by rank and row.
        """
        route, self._route = self._route, None
        if route is None or route.step != step:
            num_target_N = torch.tensor([len(loss_T) for loss_T in losses], dtype=torch.int64)
            route = self._make_route(key_N2, num_target_N, step)
        sent = []
        for rank in range(self.topology.dp_size):
            mine = [losses[row] for row in torch.where(route.owner_N == rank)[0].tolist()]
            sent.append(torch.cat([torch.empty(0), *mine]))
        counts = [int(rows_X3[:, 2].sum()) for rows_X3 in route.asked_DX3]
        loss_X = torch.cat(_exchange(sent, self.topology, counts)).numpy()
        self._take_in(torch.cat(route.asked_DX3).numpy(), loss_X, step)
        self.records.evict()

    def describe(self) -> str:
        """One line: how much this planner remembers, and has forgotten."""
        held = self.records
        return (
            f"difficulty: {held.num_targets:,} targets in {len(held):,} samples, {held.bytes_used / 1e9:.3g} of"
            f" {held.limit_bytes / 1e9:g} GB, {held.evicted_samples:,} samples evicted"
        )

    def _take_in(self, rows_N3: np.ndarray, loss_X: np.ndarray, step: int) -> None:
        _, same_N = np.unique(rows_N3, axis=0, return_inverse=True)
        turn_N = _occurrence(same_N.reshape(-1))
        for turn in range(int(turn_N.max(initial=-1)) + 1):
            own_N = turn_N == turn
            own_X = np.repeat(own_N, rows_N3[:, 2])
            self.records.observe(rows_N3[own_N, :2], rows_N3[own_N, 2], loss_X[own_X], decay=self.decay, step=step)

    def _make_route(self, key_N2: Tensor, num_target_N: Tensor, step: int) -> _Route:
        """Send (key, T) of each sample to its owner."""
        owner_N = key_N2[:, 0] % self.topology.dp_size
        rows_N3 = torch.cat([key_N2, num_target_N[:, None]], dim=1)
        sent = [rows_N3[owner_N == rank].reshape(-1) for rank in range(self.topology.dp_size)]
        return _Route(step, owner_N, [flat.view(-1, 3) for flat in _exchange(sent, self.topology)])


def _occurrence(value_N: np.ndarray) -> np.ndarray:
    """How many equal values come before each one."""
    order_N = np.argsort(value_N, kind="stable")
    sorted_N = value_N[order_N]
    place_N = np.arange(len(value_N))
    first_N = np.maximum.accumulate(np.where(np.diff(sorted_N, prepend=-1) != 0, place_N, 0))
    turn_N = np.empty(len(value_N), np.int64)
    turn_N[order_N] = place_N - first_N
    return turn_N


def _split_samples(flat_by_owner: list[Tensor], owner_N: Tensor, num_target_N: Tensor) -> list[Tensor]:
    """Give every sample its piece of what its owner sent, in order."""
    pieces: list[Tensor] = [torch.empty(0)] * len(owner_N)
    for rank, flat in enumerate(flat_by_owner):
        rows = torch.where(owner_N == rank)[0]
        for row, piece in zip(rows.tolist(), flat.split(num_target_N[rows].tolist()), strict=True):
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
