"""Reference losses of the targets of a step: remembered by content, or asked of the teacher.

The planner asks; its whole replica runs the sharded teacher; the planner gets one loss per target. What the teacher has
scored once is remembered by content, in memory or on disk; while nothing is missing the teacher does not run, and with
a cache on disk is not even built.

A row of the teacher is one sample: packed samples are read apart, as the student reads them.

Shapes: see :mod:`regate_megatron.teacher.rows`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.memory.files import KEY_BYTES
from regate_megatron.memory.references import RecentLosses, rounded
from regate_megatron.ranks.topology import Topology
from regate_megatron.support.alignment import experts_span_replicas
from regate_megatron.teacher.manifest import claim_probe
from regate_megatron.teacher.offload import Offloaded
from regate_megatron.teacher.probe import probe_rows
from regate_megatron.teacher.rows import TeacherRows, grown, rows_for_teacher
from regate_megatron.teacher.run import TeacherRun, length_multiple


class Store(Protocol):
    """What remembers losses: :class:`RecentLosses` or :class:`ReferenceCache`."""

    rounds: bool  # whether losses are used as float16 rounds them

    def look_up(self, keys: Sequence[bytes], counts: Sequence[int]) -> list[Tensor | None]: ...
    def add(self, keys: Sequence[bytes], losses: Sequence[Tensor], labels: Sequence[Tensor]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def describe(self) -> str: ...


class ReferenceLosses:
    """Reference losses by content: from the store, else from the teacher.

    A step asks in two halves, because building the teacher and bringing its weights are done by many ranks together:
    planners :meth:`look_up`, all ranks learn at the end of that stage whether any planner misses, and :meth:`fetch`
    computes what is missing, building the teacher first where it is not there.

    Args:
        config: the transformer config of the language model; it says how the teacher is cut.
        chunks: this rank's chunks of the frozen model; None: ``build`` makes them at the first miss.
        topology: the replica that runs it.
        visual, pad_token: see :func:`rows_for_teacher`.
        build: makes the teacher; called by all ranks of the world at once.
        store: what remembers losses, on planners; in memory when None.
        offload: whether the weights leave the device between uses.
        identity: who the teacher is, see :func:`.manifest.teacher_identity`.
        run_of: makes what runs of the teacher's chunks.
        proof: the cache whose fixed row a teacher is tried on when it is there; None: on none.

    Raises:
        ReGateError: the teacher gives the fixed row other losses than the cache's; on every rank.
    """

    def __init__(
        self,
        config: Any,
        chunks: Sequence[Any] | None,
        topology: Topology,
        *,
        visual: str,
        pad_token: int | None,
        build: Callable[[], Sequence[Any]] | None = None,
        store: Store | None = None,
        offload: bool = False,
        identity: dict[str, Any] | None = None,
        proof: Path | None = None,
        run_of: Callable[[Sequence[Any]], Any] = TeacherRun,
    ) -> None:
        self.config, self.topology = config, topology
        self.identity, self._proof, self._run_of = identity, proof, run_of
        self.run: TeacherRun | None = None
        self.visual, self.pad_token = visual, pad_token
        self.store = store
        if store is None and topology.is_planner:
            self.store = RecentLosses()
        self.seconds, self.num_found, self.num_computed = 0.0, 0, 0
        self._build, self._offloads = build, offload
        self._offloaded: Offloaded | None = None
        self._found: list[Tensor | None] = []
        self._missing: dict[bytes, list[int]] = {}
        self._request: TeacherRows | None = None
        if chunks is not None:
            self._adopt(chunks)

    def look_up(self, facts: Sequence[MicrobatchFacts]) -> bool:
        """Look this step's samples up; planners call this. Returns whether any has to be computed."""
        start = time.perf_counter()
        samples = [(one, sample) for one in facts for sample in range(one.num_samples)]
        keys = [key for one in facts for key in key_bytes(one.reference_key_N2)]
        counts = torch.cat([one.num_target_N for one in facts]).tolist()
        self._found, self._missing = self.store.look_up(keys, counts), {}
        for number, (loss_T, count) in enumerate(zip(self._found, counts, strict=True)):
            if count == 0:
                self._found[number] = torch.empty(0)
            elif loss_T is None:
                self._missing.setdefault(keys[number], []).append(number)
        self.num_computed += len(self._missing)
        self.num_found += len(keys) - len(self._missing)
        self._request = self._rows([samples[numbers[0]] for numbers in self._missing.values()])
        self.seconds += time.perf_counter() - start
        return self._request is not None

    def fetch(self, micro_batch_size: int, *, anyone_misses: bool) -> list[Tensor] | None:
        """The losses of every sample of the step looked up; all ranks of all replicas call this.

        Args:
            micro_batch_size: b, rows per forward of the teacher.
            anyone_misses: whether :meth:`look_up` was true on any planner; the same on every rank.

        Returns:
            On the planner one float32 [T] per sample, in the order of its targets; None elsewhere. A loss that is not
            finite comes back as it is, and is not remembered.

        Raises:
            ReGateError: a planner could not lay the rows out, or remember the losses; on every rank.
        """
        start = time.perf_counter()
        if anyone_misses:
            self.require_teacher()
            with self.topology.together("rows for the teacher"):
                request = self._share(self._level(self._request) if self.topology.is_planner else None)
            losses = self._run(request, micro_batch_size) if request is not None else []
            with self.topology.together("reference losses", allowed="a store that can be written", change="the store"):
                if request is not None and self.topology.is_planner:
                    self._take(request, losses)
        self.seconds += time.perf_counter() - start
        return self._found if self.topology.is_planner else None

    def require_teacher(self) -> TeacherRun:
        """The teacher, built now if it is not there; all ranks of the world call this."""
        if self.run is None:
            if dist.get_rank() == 0:
                print("[regate] a reference loss is missing: the teacher is built now", flush=True)
            self._adopt(self._build())
        return self.run

    def flush(self) -> None:
        """Put on disk what waits for it."""
        if self.store is not None:
            self.store.flush()

    def close(self) -> None:
        """Put on disk what waits for it, give the teacher back as it was, and stop."""
        if self.store is not None:
            self.store.close()
        if self._offloaded:
            self._offloaded.bring()
        if self.run is not None:
            self.run.detach()

    def describe(self) -> str:
        """What the teacher is and what is remembered, in lines."""
        lines = ["teacher: not built, nothing missed yet"]
        if self.run is not None:
            parameters = sum(parameter.numel() for chunk in self.run.chunks for parameter in chunk.parameters())
            lines = [f"teacher: {parameters:,} parameters on this rank, visual positions {self.visual}"]
            lines[0] += ", on the host between uses" if self._offloads else ""
        if self.store is not None:
            lines.append(f"{self.store.describe()}; {self.num_found:,} found, {self.num_computed:,} computed")
        return "\n".join(lines)

    def _adopt(self, chunks: Sequence[Any]) -> None:
        self.run = self._run_of(chunks)
        if self._offloads:
            self._offloaded = Offloaded(self.run.chunks)
        if self._proof is not None:
            self._prove()

    def _run(self, request: TeacherRows, micro_batch_size: int) -> list[Tensor]:
        if self._offloaded:
            self._offloaded.bring()
        losses = self.run(request, micro_batch_size)
        if self._offloaded:
            self._offloaded.leave()
        return losses

    def _prove(self) -> None:
        """Compare the fixed row's losses with those in the cache; all ranks of the world call this."""
        losses = self._run(probe_rows(self.run.chunks[0], length_multiple(self.config)), 1)
        with self.topology.together("reference cache", allowed="a folder that can be written"):
            if self.topology.is_planner and self.topology.dp_rank == 0:
                claim_probe(self._proof, losses[0].tolist(), self.identity["dtype"])

    def _rows(self, samples: Sequence[tuple[MicrobatchFacts, int]]) -> TeacherRows | None:
        if not samples:
            return None

        def stack(name: str) -> Tensor:
            pieces = [one.row_of(name, sample) for one, sample in samples]
            return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

        names = ("token_BS", "position_id_BS", "label_BS", "is_target_BS", "is_context_BS", "is_visual_BS")
        return rows_for_teacher(
            *map(stack, names), visual=self.visual, pad_token=self.pad_token, multiple=length_multiple(self.config)
        )

    def _level(self, request: TeacherRows | None) -> TeacherRows | None:
        """With expert parallelism, a request as large as any replica's: their experts meet in every layer.

        All planners call this, over their group, one small reduction; without expert parallelism none communicates.
        """
        if not experts_span_replicas(self.config):
            return request
        own = request.sizes if request is not None else torch.zeros(5, dtype=torch.int64)
        sizes = self.topology.all_reduce_planners(own, "max")
        return grown(request, sizes) if int(sizes[0]) else None

    def _take(self, request: TeacherRows, losses: Sequence[Tensor]) -> None:
        """Give the samples of the step their losses, and remember the finite ones."""
        known = []
        for (key, numbers), loss_T, label_T, count in zip(
            self._missing.items(), losses, request.label_NT, request.num_target_N.tolist(), strict=False
        ):  # rows that only other replicas' requests made come last
            loss_T = loss_T[:count].clone()
            if bool(loss_T.isfinite().all()):
                loss_T = rounded(loss_T) if self.store.rounds else loss_T
                known.append((key, loss_T, label_T[:count]))
            for number in numbers:
                self._found[number] = loss_T
        if known:
            self.store.add(*zip(*known, strict=True))

    def _share(self, request: TeacherRows | None) -> TeacherRows | None:
        flat = self.topology.broadcast_from_planner(request.pack() if request is not None else None)
        return request if self.topology.replica_size == 1 or flat is None else TeacherRows.unpack(flat)


def key_bytes(key_N2: Tensor) -> list[bytes]:
    """128-bit keys, int64 [N, 2], as 16 bytes each."""
    flat = key_N2.contiguous().numpy().tobytes()
    return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]
