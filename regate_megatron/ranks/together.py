"""Failing together: a fault on any rank, in any stage, ends all ranks of all replicas with the same line.

    with topology.together("reading the batch") as stage:
        ...                      # any rank may raise here
        stage.wish = is_missing
    if stage.anyone_wishes: ...

All ranks run the same stages in the same order. At the end of a stage they tell one another whether it went well, in
three small messages on the host: over each replica, over the planners, and from each planner back to its replica. When
a rank has failed, all of them raise :class:`ReGateError` with the text of the lowest rank that has one.

**Exchanges within a stage** would wait for a rank that has failed before it got there. So within a stage ranks talk by
the methods of :class:`~regate_megatron.ranks.topology.Topology` alone, each of which begins with the very message that
ends a stage: planners meet in :meth:`Together.meet_planners`, ranks of a replica in :meth:`Together.meet_replica`. A
rank that failed goes straight to the end of the stage, where its first messages are those that the others wait in; who
learns there that a rank has failed leaves the stage and goes on behind that one. So every rank sends the same messages
in the same order whatever happens, and none is left behind.

What this cannot catch is a rank that is gone (killed, or stuck in a device's collective): gloo then breaks the
connections of those who wait for it, and launchers end the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from regate_megatron.errors import ReGateError, refuse

if TYPE_CHECKING:
    from regate_megatron.ranks.topology import Topology


_REPORT = "nothing in the settings: please report this fault"
_FLAGS = 4  # whether a rank failed, and what Stage tells of all
_GLOO_SAYS = ("by peer", "Connection", "Timed out")  # of a rank that is gone, or does not answer


class _AnotherFailed(Exception):
    """This rank heard within a stage that another one has failed."""


@dataclass
class Stage:
    """A stage in progress.

    Attributes:
        wish: something this rank asks of all.
        count: a number that all ranks are to have alike.
        anyone_wishes: whether any rank does; known after the stage.
        counts: the least and the largest count of all ranks; known after the stage.
    """

    wish: bool = False
    count: int = 0
    anyone_wishes: bool = False
    counts: tuple[int, int] = (0, 0)


class Together:
    """The stages of one rank; see the module's text. Stages do not nest."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._is_open = False
        self._met = 0  # 1: the replica's message of a failing stage's end is exchanged already, 2: the planners' is

    @contextmanager
    def __call__(self, doing: str, *, allowed: str = "no fault", change: str = _REPORT) -> Iterator[Stage]:
        """A stage; all ranks of all replicas enter it.

        Args:
            doing: what is done, for the line that a fault other than a refusal becomes.
            allowed, change: of that line.

        Raises:
            ReGateError: a rank failed; on every rank.
        """
        assert not self._is_open, f"{doing}: within another stage, whose messages it would take for its own"
        stage, error = Stage(), None
        self._is_open, self._met = True, 0
        try:
            yield stage
        except _AnotherFailed:
            pass
        except ReGateError as refusal:
            error = str(refusal)
        except Exception as fault:  # whatever it is, the other ranks wait to hear of it
            given = f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__
            error = str(_gone(fault) or refuse(doing, given=given, allowed=allowed, change=change))
        finally:
            self._is_open = False
        wish, most, least = self._end(error, [int(stage.wish), stage.count, -stage.count])
        stage.anyone_wishes, stage.counts = bool(wish), (-least, most)

    def meet_planners(self) -> None:
        """Begin an exchange of all planners, in a stage or outside of one; planners only."""
        self._leave_if_failed(self._over_planners(torch.zeros(_FLAGS, dtype=torch.int64)), met=2)

    def meet_replica(self) -> None:
        """Begin an exchange of this replica's ranks, in a stage or outside of one."""
        self._leave_if_failed(self._over_replica(torch.zeros(_FLAGS, dtype=torch.int64)), met=1)

    def _leave_if_failed(self, flags: torch.Tensor, met: int) -> None:
        if int(flags[0]):
            self._met = met
            raise _AnotherFailed

    def _end(self, error: str | None, asked: list[int]) -> list[int]:
        """The three messages that end a stage, but for those exchanged already; the largest of what ranks asked."""
        topology, known = self._topology, self._met
        flags = torch.tensor([int(bool(error or known)), *asked])
        try:
            if known != 1:
                flags = self._over_replica(flags)
            if topology.is_planner and known != 2:
                flags = self._over_planners(flags)
            if topology.replica_size > 1:
                dist.broadcast(flags, topology.planner_rank, group=topology.replica_group)
            if not int(flags[0]):
                return flags[1:].tolist()
            error = self._first(error)
        except RuntimeError as fault:  # gloo's word that a rank is gone
            error = error or str(_gone(fault) or fault)
        raise ReGateError(error, everywhere=True) from None

    def _over_replica(self, flags: torch.Tensor) -> torch.Tensor:
        if self._topology.replica_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._topology.replica_group)
        return flags

    def _over_planners(self, flags: torch.Tensor) -> torch.Tensor:
        if self._topology.dp_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._topology.planner_group)
        return flags

    def _first(self, error: str | None) -> str:
        """The text of the lowest rank that has one; all ranks call this, once they know that there is one."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return error
        reports: list = [None] * dist.get_world_size()
        dist.all_gather_object(reports, error, group=self._topology.world_group)
        return next(text for text in reports if text)


def _gone(fault: Exception) -> ReGateError | None:
    """The line for a message that got no answer; None for any other fault."""
    if not isinstance(fault, RuntimeError) or not any(words in str(fault) for words in _GLOO_SAYS):
        return None
    given = "no answer from another rank, which has stopped"
    return refuse("ranks", given=given, allowed="all ranks in every step", change="what that rank's own line says")
