"""Reference losses of the targets of a step: remembered by content, or asked of the teacher.

The planner asks; its whole replica runs the sharded teacher; the planner gets one loss per target.

A row of the teacher is one sample: packed samples are read apart, as the student reads them.

Shapes: see :mod:`regate_megatron.teacher.rows`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.teacher.rows import TeacherRows, rows_for_teacher
from regate_megatron.teacher.run import TeacherRun
from regate_megatron.topology import Topology


class ReferenceLosses:
    """Reference losses by content, computed by ``teacher`` when first asked for.

    Args:
        chunks: this rank's chunks of the frozen model.
        topology: the replica that runs it.
        visual, pad_token: see :func:`rows_for_teacher`.
    """

    def __init__(self, chunks: Sequence[Any], topology: Topology, *, visual: str, pad_token: int | None) -> None:
        self.run, self.topology = TeacherRun(chunks), topology
        self.visual, self.pad_token = visual, pad_token
        self.seconds = 0.0
        self._known: dict[tuple[int, int], Tensor] = {}

    def fetch(self, facts: list[MicrobatchFacts] | None, micro_batch_size: int) -> list[Tensor] | None:
        """The losses of every sample's targets; all ranks of the replica call this.

        Args:
            facts: this step's microbatches on the planner, None elsewhere.
            micro_batch_size: b, rows per forward of the teacher.

        Returns:
            On the planner one float32 [T] per sample, in the order of its targets; None elsewhere.
        """
        start = time.perf_counter()
        request = self._share(self._missing(facts) if self.topology.is_planner else None)
        if request is not None:
            losses = self.run(request, micro_batch_size)
            if self.topology.is_planner:
                for key, loss_T, count in zip(self._asked, losses, request.num_target_N.tolist(), strict=True):
                    self._known[key] = loss_T[:count].clone()
        self.seconds += time.perf_counter() - start
        if not self.topology.is_planner:
            return None
        return [self._known[key] for one in facts for key in _keys(one.reference_key_N2)]

    def describe(self) -> str:
        """One line: what the teacher is and what it has seen."""
        parameters = sum(parameter.numel() for chunk in self.run.chunks for parameter in chunk.parameters())
        return f"teacher: {parameters:,} parameters on this rank, visual positions {self.visual}"

    def _missing(self, facts: list[MicrobatchFacts]) -> TeacherRows | None:
        samples: dict[tuple[int, int], tuple[MicrobatchFacts, int]] = {}
        for one in facts:
            for sample, key in enumerate(_keys(one.reference_key_N2)):
                if key not in self._known:
                    samples[key] = (one, sample)
        self._asked = list(samples)
        if not samples:
            return None

        def stack(name: str) -> Tensor:
            pieces = [one.row_of(name, sample) for one, sample in samples.values()]
            return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

        names = ("token_BS", "position_id_BS", "label_BS", "is_target_BS", "is_context_BS", "is_visual_BS")
        return rows_for_teacher(
            *map(stack, names), visual=self.visual, pad_token=self.pad_token, multiple=self.run.length_multiple
        )

    def _share(self, request: TeacherRows | None) -> TeacherRows | None:
        if self.topology.replica_size == 1:
            return request
        group, source = self.topology.replica_group, self.topology.planner_rank
        flat = request.pack() if request is not None else torch.empty(0, dtype=torch.int64)
        size = torch.tensor([flat.numel()])
        dist.broadcast(size, source, group=group)
        if not int(size):
            return None
        if not self.topology.is_planner:
            flat = torch.empty(int(size), dtype=torch.int64)
        dist.broadcast(flat, source, group=group)
        return TeacherRows.unpack(flat)


def _keys(key_N2: Tensor) -> list[tuple[int, int]]:
    return [(first, second) for first, second in key_N2.tolist()]
