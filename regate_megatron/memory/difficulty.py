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

Shapes: N samples of this rank in a step, T targets of a sample, X of all of them, D planners.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.memory.records import Records
from regate_megatron.ranks.topology import Topology


class TokenPrior:
    """Running mean loss per target token id, shared by all planners."""

    name = "own"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean_V = torch.zeros(0, dtype=torch.float64)
        self.is_seen_V = torch.zeros(0, dtype=torch.bool)
        self.overall = 0.0
        self.any_seen = False

    def look_up(self, label_X: Tensor) -> Tensor:
        """The prior of each label; float64."""
        self._grow(int(label_X.max()) + 1 if label_X.numel() else 0)
        label_X = label_X.numpy()
        return torch.from_numpy(np.where(self.is_seen_V.numpy()[label_X], self.mean_V.numpy()[label_X], self.overall))

    def update(self, label_X: Tensor, loss_X: Tensor, topology: Topology) -> None:
        """Take in one dense step's targets of this rank; all planners call this, one sum over them.

        Args:
            label_X, loss_X: labels (int64) and losses (float64) of every target of this rank.
        """
        self._grow(int(label_X.max()) + 1 if label_X.numel() else 0)
        size = int(topology.all_reduce_planners(torch.tensor([len(self.mean_V)]), "max"))  # each has looked up its own
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

    def snapshot(self) -> tuple[np.ndarray, dict[str, Any]]:
        """All that is known: the mean of each id, float64, NaN where never seen; and words."""
        words = {"overall": self.overall, "any_seen": self.any_seen}
        return self.mean_V.masked_fill(~self.is_seen_V, math.nan).numpy(), words

    def restore(self, values: np.ndarray, words: dict[str, Any]) -> None:
        """Take what :meth:`snapshot` gave."""
        mean_V = torch.from_numpy(values)
        self.mean_V, self.is_seen_V = mean_V.nan_to_num(0.0), ~mean_V.isnan()
        self.overall, self.any_seen = words["overall"], words["any_seen"]

    def _grow(self, size: int) -> None:
        missing = size - len(self.mean_V)
        if missing > 0:
            self.mean_V = torch.cat([self.mean_V, torch.zeros(missing, dtype=torch.float64)])
            self.is_seen_V = torch.cat([self.is_seen_V, torch.zeros(missing, dtype=torch.bool)])


@dataclass(frozen=True)
class _Route:
    """Who asks whom for what in one step: what fetching learns of it, the update of the same step uses again.

    Attributes:
        order_X: the targets of this rank's samples, by the samples' owner.
        own_D: targets of its samples that each planner owns.
        asked_X3: (key, T) of the samples that this planner owns, by the planner that has them.
        asked_D: their targets.
    """

    step: int
    order_X: Tensor
    own_D: Tensor
    asked_X3: Tensor
    asked_D: Tensor


class DifficultyStore:
    """m per sample and target, sharded by key over the planners.

    A sample's record is one number per target, in the order of their positions; NaN where never observed.

    Args:
        decay: β.
        limit_bytes: host memory of the records on each planner; see :mod:`regate_megatron.memory.records`.
    """

    def __init__(self, decay: float, topology: Topology, limit_bytes: float) -> None:
        self.decay, self.topology = decay, topology
        self.records = Records(limit_bytes)
        self._route: _Route | None = None

    def __len__(self) -> int:
        return len(self.records)

    def fetch(self, key_N2: Tensor, num_target_N: Tensor, step: int) -> Tensor:
        """The records of this rank's samples, one after the other, float32 [X]; NaN where never observed.

        All planners call this, over their group: one small exchange of keys, one of records.
        """
        route = self._route = self._make_route(key_N2, num_target_N, step)
        asked_X3 = route.asked_X3.numpy()
        answer_X = torch.from_numpy(self.records.read(asked_X3[:, :2], asked_X3[:, 2])).float()
        record_X, _ = self.topology.exchange_planners(answer_X, route.asked_D, route.own_D)
        return torch.empty_like(record_X).index_copy_(0, route.order_X, record_X)

    def forget_route(self) -> None:
        """The samples of this step have moved between planners since they were fetched; all planners call this."""
        self._route = None

    def update(self, key_N2: Tensor, num_target_N: Tensor, loss_X: Tensor, step: int) -> None:
        """Take in this step's losses: of one sample after the other, float32 [X], NaN where the target did not run.

        All planners call this, over their group: one exchange of losses, and one of keys unless the same step was
        fetched before. The same key in several rows is taken in one after the other, by rank and row.
        """
        route, self._route = self._route, None
        if route is None or route.step != step:
            route = self._make_route(key_N2, num_target_N, step)
        loss_X, _ = self.topology.exchange_planners(loss_X[route.order_X], route.own_D, route.asked_D)
        self._take_in(route.asked_X3.numpy(), loss_X.numpy(), step)
        self.records.evict()

    def describe(self) -> str:
        """One line: how much this planner remembers, and has forgotten."""
        held = self.records
        return (
            f"difficulty: {held.num_targets:,} targets in {len(held):,} samples, {held.bytes_used / 1e9:.3g} of"
            f" {held.limit_bytes / 1e9:g} GB, {held.evicted_samples:,} samples evicted"
        )

    def _take_in(self, rows_N3: np.ndarray, loss_X: np.ndarray, step: int) -> None:
        turn_N = _occurrence(rows_N3)
        for turn in range(int(turn_N.max(initial=-1)) + 1):
            own_N = turn_N == turn
            own_X = slice(None) if own_N.all() else np.repeat(own_N, rows_N3[:, 2])
            self.records.observe(rows_N3[own_N, :2], rows_N3[own_N, 2], loss_X[own_X], decay=self.decay, step=step)

    def _make_route(self, key_N2: Tensor, num_target_N: Tensor, step: int) -> _Route:
        """Send (key, T) of each sample to its owner."""
        num_planners = self.topology.dp_size
        owner_N = key_N2[:, 0] % num_planners
        order_N = owner_N.argsort(stable=True)
        rows_N3 = torch.cat([key_N2, num_target_N[:, None]], dim=1)
        asked_X3, samples_D = self.topology.exchange_planners(
            rows_N3[order_N], torch.bincount(owner_N, minlength=num_planners)
        )
        asker_X = torch.arange(num_planners).repeat_interleave(samples_D)
        return _Route(
            step=step,
            order_X=_laid_out(num_target_N, order_N),
            own_D=torch.zeros(num_planners, dtype=torch.int64).index_add_(0, owner_N, num_target_N),
            asked_X3=asked_X3,
            asked_D=torch.zeros(num_planners, dtype=torch.int64).index_add_(0, asker_X, asked_X3[:, 2]),
        )


def _laid_out(count_N: Tensor, order_N: Tensor) -> Tensor:
    """Where the values of samples lie, sample by sample in another order; int64 [X]."""
    first_N, count_N = (count_N.cumsum(0) - count_N)[order_N], count_N[order_N]
    moved_N = first_N - (count_N.cumsum(0) - count_N)
    return torch.arange(int(count_N.sum())) + moved_N.repeat_interleave(count_N)


def _occurrence(rows_Nx: np.ndarray) -> np.ndarray:
    """How many equal rows come before each one."""
    seen: Counter[bytes] = Counter()
    turns = []
    for row in rows_Nx:
        key = row.tobytes()
        turns.append(seen[key])
        seen[key] += 1
    return np.array(turns, np.int64)
