"""The rows of a step dealt to ranks, between peek and plan: who gets what, and the exchange itself.

Whole microbatches move, so every row keeps its weight in the loss whatever that is divided by. All planners learn the
lengths that all microbatches ask for and the deal follows (:mod:`regate_megatron.method.deal`); each tells its replica,
whose ranks with data exchange with their peers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regate_megatron.errors import refuse
from regate_megatron.method.deal import at_best, deal
from regate_megatron.ranks.rows import Peers, like_at_home, pack
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.planner import Planner
from regate_megatron.step.step import Step


class Dealing:
    """Deals the microbatches of steps.

    Args:
        in_columns: whether replicas wait for each other in every microbatch (they share experts).
    """

    def __init__(self, topology: Topology, planner: Planner | None, in_columns: bool) -> None:
        self._topology, self._planner, self._in_columns = topology, planner, in_columns
        self._peers: Peers | None = None

    def close(self) -> None:
        """Give back what is open; any rank, no communication."""
        if self._peers is not None:
            self._peers.close()

    def meet(self, step: Step) -> None:
        """Find this rank's peers, once, and see that its microbatches can travel. All ranks call this after the peek.

        Raises:
            ReGateError: some of the peers have no data, or a batch cannot be described; on every rank.
        """
        has_data = any(pulled is not None for pulled in step.batches)
        if self._peers is None:
            self._peers = Peers(self._topology, has_data)
            with self._topology.together("batch"):
                for pulled in step.batches:
                    for batch in pulled or ():
                        pack(batch)

    def decide(self, step: Step, counts: tuple[int, int]) -> tuple[np.ndarray, list[dict[int, Any]]]:
        """What each place gets, and this rank's microbatches that leave it, packed; within a stage of all ranks.

        Args:
            counts: the fewest and the most microbatches that a rank has in this step.

        Raises:
            ReGateError: these differ, or data is missing that was there before.
        """
        least, most = counts
        if least != most:
            raise refuse(
                "global batch",
                given=f"from {least} to {most} microbatches on data-parallel ranks",
                allowed="as many on each",
                change="the data loader",
            )
        topology, flat = self._topology, None
        if self._planner:
            flat = torch.from_numpy(self._deal(step)).flatten()
        flat = topology.broadcast_from_planner(flat, topology.dp_size * most)
        from_DM = flat.view(topology.dp_size, -1).numpy()
        has_data = any(pulled is not None for pulled in step.batches)
        if has_data != self._peers.has_data:
            raise refuse(
                "data iterator",
                given="data in one step and none in another" if not has_data else "data where there was none before",
                allowed="data on the same ranks in every step",
                change="the data loader, or --regate-budget to balanced, which moves no row",
            )
        num_micro, rank = from_DM.shape[1], self._topology.dp_rank
        leaves = set((from_DM[np.arange(len(from_DM)) != rank] - rank * num_micro).ravel().tolist())
        packed = [
            {at: pack(batch) for at, batch in enumerate(pulled) if at in leaves}
            for pulled in step.batches
            if pulled is not None
        ]
        return from_DM, packed

    def exchange(self, step: Step, from_DM: np.ndarray, packed: list[dict[int, Any]]) -> None:
        """Put the microbatches dealt to this rank in place of its own; within a stage of all ranks, at its beginning.

        Facts of those that stay go with them; those of others are None.
        """
        num_micro, rank = from_DM.shape[1], self._topology.dp_rank
        is_moved = bool((from_DM // num_micro != np.arange(len(from_DM))[:, None]).any())
        came_by_iterator = iter(self._peers.exchange(packed, from_DM) if is_moved else [{} for _ in packed])
        for index, pulled in enumerate(step.batches):
            if pulled is None:
                continue
            came = next(came_by_iterator)
            step.batches[index] = [
                like_at_home(came[at], pulled[0]) if at in came else pulled[source - rank * num_micro]
                for at, source in enumerate(from_DM[rank].tolist())
            ]
        if step.facts is not None:
            own = {rank * num_micro + at: facts for at, facts in enumerate(step.facts)}
            step.facts = [own.get(source) for source in from_DM[rank].tolist()]

    def _deal(self, step: Step) -> np.ndarray:
        """The deal; planners call this, over their group."""
        positions_M, key_M = self._planner.asked(step)
        table_D2M = self._topology.all_gather_planners(torch.cat([positions_M, key_M])).numpy()
        length_DM, key_DM = np.split(table_D2M, 2, axis=1)
        step.at_best = at_best(length_DM)[0] * len(length_DM) / max(int(length_DM.sum()), 1)
        return deal(length_DM, key_DM, in_columns=self._in_columns).from_DM
