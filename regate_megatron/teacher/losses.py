"""Run the teacher: reference losses of the targets of a step, on the student's own ranks, forward-only.

The planner asks; its whole replica runs the sharded teacher through Megatron's pipeline schedule; the planner gets one
loss per target. Logits are made at target positions only. What the teacher has scored once is remembered by content, in
memory or on disk; while nothing is missing the teacher does not run, and with a cache on disk is not even built.

A row of the teacher is one sample: packed samples are read apart, as the student reads them.

Shapes: see :mod:`regate_megatron.teacher.rows`; b rows per teacher microbatch, H hidden, R rows of this rank in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.hooks import CurrentMicrobatch, DecoderHook
from regate_megatron.plan import MicrobatchPlan
from regate_megatron.teacher.cache import rounded
from regate_megatron.teacher.cache_files import KEY_BYTES
from regate_megatron.teacher.memory import RecentLosses
from regate_megatron.teacher.offload import Offloaded
from regate_megatron.teacher.rows import TeacherRows, rows_for_teacher
from regate_megatron.topology import Topology


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
    planners :meth:`look_up`, all ranks learn whether any planner misses (:meth:`Topology.agree`), and :meth:`fetch`
    computes what is missing, building the teacher first where it is not there.

    Args:
        teacher: this rank's chunk of the frozen model; None: ``build`` makes it at the first miss.
        topology: the replica that runs it.
        visual, pad_token: see :func:`rows_for_teacher`.
        build: makes the teacher; called by all ranks of the world at once.
        store: what remembers losses, on planners; in memory when None.
        offload: whether the weights leave the device between uses.
    """

    def __init__(
        self,
        teacher: Any,
        topology: Topology,
        *,
        visual: str,
        pad_token: int | None,
        build: Callable[[], Any] | None = None,
        store: Store | None = None,
        offload: bool = False,
    ) -> None:
        self.teacher, self.topology = None, topology
        self.visual, self.pad_token = visual, pad_token
        self.store = store
        if store is None and topology.is_planner:
            self.store = RecentLosses()
        self.seconds, self.num_found, self.num_computed = 0.0, 0, 0
        self._build, self._offloads = build, offload
        self._offloaded: Offloaded | None = None
        self._current = CurrentMicrobatch()
        self._target_slot_bT: Tensor | None = None
        self._found: list[Tensor | None] = []
        self._missing: dict[bytes, list[int]] = {}
        self._request: TeacherRows | None = None
        if teacher is not None:
            self._adopt(teacher)

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
        """
        start = time.perf_counter()
        if anyone_misses:
            self.require_teacher()
            request = self._share(self._request)
            if request is not None:
                if self._offloaded:
                    self._offloaded.bring()
                losses = self._run(request, micro_batch_size)
                if self._offloaded:
                    self._offloaded.leave()
                if self.topology.is_planner:
                    self._take(request, losses)
        self.seconds += time.perf_counter() - start
        return self._found if self.topology.is_planner else None

    def require_teacher(self) -> Any:
        """The teacher, built now if it is not there; all ranks of the world call this."""
        if self.teacher is None:
            if dist.get_rank() == 0:
                print("[regate] a reference loss is missing: the teacher is built now", flush=True)
            self._adopt(self._build())
        return self.teacher

    def flush(self) -> None:
        """Put on disk what waits for it."""
        if self.store is not None:
            self.store.flush()

    def close(self) -> None:
        """Put on disk what waits for it, and stop."""
        if self.store is not None:
            self.store.close()

    def describe(self) -> str:
        """What the teacher is and what is remembered, in lines."""
        lines = ["teacher: not built, nothing missed yet"]
        if self.teacher is not None:
            parameters = sum(parameter.numel() for parameter in self.teacher.parameters())
            lines = [f"teacher: {parameters:,} parameters on this rank, visual positions {self.visual}"]
            lines[0] += ", on the host between uses" if self._offloads else ""
        if self.store is not None:
            lines.append(f"{self.store.describe()}; {self.num_found:,} found, {self.num_computed:,} computed")
        return "\n".join(lines)

    def _adopt(self, teacher: Any) -> None:
        self.teacher, self.device = teacher, next(teacher.parameters()).device
        self._hook = DecoderHook(teacher, self._current, dense_layers=0, arrives_short=True)
        if teacher.post_process:
            teacher.output_layer.register_forward_pre_hook(self._targets_only)
        if self._offloads:
            self._offloaded = Offloaded(teacher)

    def _rows(self, samples: Sequence[tuple[MicrobatchFacts, int]]) -> TeacherRows | None:
        if not samples:
            return None

        def stack(name: str) -> Tensor:
            pieces = [one.row_of(name, sample) for one, sample in samples]
            return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)

        names = ("token_BS", "position_id_BS", "label_BS", "is_target_BS", "is_context_BS", "is_visual_BS")
        return rows_for_teacher(*map(stack, names), visual=self.visual, pad_token=self.pad_token)

    def _take(self, request: TeacherRows, losses: Sequence[Tensor]) -> None:
        """Give the samples of the step their losses, and remember the finite ones."""
        known = []
        for (key, numbers), loss_T, label_T, count in zip(
            self._missing.items(), losses, request.label_NT, request.num_target_N.tolist(), strict=True
        ):
            loss_T = loss_T[:count].clone()
            if bool(loss_T.isfinite().all()):
                loss_T = rounded(loss_T) if self.store.rounds else loss_T
                known.append((key, loss_T, label_T[:count]))
            for number in numbers:
                self._found[number] = loss_T
        if known:
            self.store.add(*zip(*known, strict=True))

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

    @torch.no_grad()
    def _run(self, request: TeacherRows, micro_batch_size: int) -> list[Tensor]:
        """Per-target losses of every row on the last stage, [T] each; an empty list on other stages."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules

        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            schedule = schedules.forward_backward_pipelining_without_interleaving
        else:
            schedule = schedules.forward_backward_no_pipelining
        microbatches = _microbatches(request, micro_batch_size)
        outputs = schedule(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=[self.teacher],
            num_microbatches=len(microbatches),
            seq_length=request.token_NK.shape[1],
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self.teacher.post_process:
            return []
        return list(torch.cat(outputs).float().cpu()[: len(request)])

    def _forward_step(self, microbatches: Any, model: Any) -> tuple[Tensor, Any]:
        rows: TeacherRows = next(microbatches)
        device = self.device
        plan = MicrobatchPlan(rows.dense_length, rows.position_NK.to(device), rows.num_read_N.to(device))
        self._target_slot_bT = rows.target_slot_NT.to(device)
        with self._current.running(plan, None):
            output = model(
                rows.token_NK.to(device),
                rows.position_id_NK.to(device),
                attention_mask=None,
                labels=rows.label_NT.to(device) if model.post_process else None,
            )
        return output, lambda losses, non_loss_data=True: losses

    def _targets_only(self, _layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: hidden states [K, b, H] at target positions, [T, b, H]."""
        hidden_KbH = inputs[0]
        index_TbH = self._target_slot_bT.t()[:, :, None].expand(-1, -1, hidden_KbH.shape[-1])
        return (hidden_KbH.gather(0, index_TbH), *inputs[1:])


def key_bytes(key_N2: Tensor) -> list[bytes]:
    """128-bit keys, int64 [N, 2], as 16 bytes each."""
    flat = key_N2.contiguous().numpy().tobytes()
    return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]


def _microbatches(request: TeacherRows, size: int) -> list[TeacherRows]:
    """Cut a request into microbatches of ``size`` rows; the last is filled up with copies of its last row."""
    pieces = []
    for start in range(0, len(request), size):
        index = torch.arange(start, start + size).clamp_max(len(request) - 1)
        fields = {name: value[index] for name, value in vars(request).items() if torch.is_tensor(value)}
        pieces.append(TeacherRows(request.dense_length, **fields))
    return pieces
