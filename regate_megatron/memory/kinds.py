"""What the student loses today on a kind of target: the same label, and a reference loss in the same bin.

For data that come a few times, or once: a running average of a target's own losses then has no time to move, and keeps
what was hard long ago. A kind is seen in every dense step. Its mean is that of the last dense steps: sums and numbers
both shrink by the decay before a step is added, so that a frequent kind follows at once and a rare one keeps what is
known of it. One more target with the mean of the bin stands beside them, which counts where little else is known.

Dense steps only, in which all targets run: else the mean would be that of hard ones.

Shapes: X targets of this planner, V labels, C kinds, the bins of one label after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.ranks.topology import Topology

EDGES = (0.1, 0.5, 1.5, 3.0, 6.0)
"""Where one bin of reference losses ends and the next begins, in nats."""

_BINS = len(EDGES) + 1


class KindMeans:
    """Mean losses by kind, the same on all planners.

    Args:
        decay: how much of sums and numbers stays when a dense step is added.
    """

    name = "kind"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.totals_2C = torch.zeros(2, 0, dtype=torch.float64)  # sums of losses, and how many

    @property
    def any_seen(self) -> bool:
        """Whether any loss is known."""
        return bool((self.totals_2C[1] > 0).any())

    def look_up(self, label_X: Tensor, reference_X: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each target's kind, float64 [X], and whether the kind was ever seen, bool [X]."""
        kind_X = self._kinds(label_X, reference_X)
        sum_C, count_C = self.totals_2C
        sum_B, count_B = self.totals_2C.view(2, -1, _BINS).sum(dim=1)
        overall = sum_B.sum() / count_B.sum().clamp_min(1e-300)
        mean_B = torch.where(count_B > 0, sum_B / count_B.clamp_min(1e-300), overall)
        mean_X = (sum_C[kind_X] + mean_B[kind_X % _BINS]) / (count_C[kind_X] + 1)
        return mean_X, count_C[kind_X] > 0

    def update(self, label_X: Tensor, reference_X: Tensor, loss_X: Tensor, topology: Topology) -> None:
        """Take in one dense step's targets of this rank; all planners call this, one sum over them."""
        kind_X = self._kinds(label_X, reference_X)
        size = torch.tensor([self.totals_2C.shape[1]])
        self._grow(int(topology.all_reduce_planners(size, "max")))
        own_2C = torch.zeros_like(self.totals_2C)
        own_2C[0].index_add_(0, kind_X, loss_X)
        own_2C[1].index_add_(0, kind_X, torch.ones_like(loss_X))
        self.totals_2C = self.decay * self.totals_2C + topology.all_reduce_planners(own_2C, "sum")

    def snapshot(self) -> tuple[np.ndarray, dict[str, Any]]:
        """All that is known: numbers, float64, and words."""
        return self.totals_2C.numpy().copy().reshape(-1), {"of": self.name}

    def restore(self, values: np.ndarray, words: dict[str, Any]) -> None:
        """Take what :meth:`snapshot` gave."""
        self.totals_2C = torch.from_numpy(values.copy()).view(2, -1)

    def _kinds(self, label_X: Tensor, reference_X: Tensor) -> Tensor:
        """The kind of each target; int64. Room is made for them."""
        self._grow(_BINS * (int(label_X.max()) + 1 if label_X.numel() else 0))
        return _BINS * label_X + torch.bucketize(reference_X, torch.tensor(EDGES, dtype=torch.float64), right=True)

    def _grow(self, size: int) -> None:
        missing = size - self.totals_2C.shape[1]
        if missing > 0:
            self.totals_2C = torch.cat([self.totals_2C, torch.zeros(2, missing, dtype=torch.float64)], dim=1)
