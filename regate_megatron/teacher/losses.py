"""Run the teacher: reference losses of the targets of a step, on the student's own ranks, forward-only.

The planner asks; its whole replica runs the sharded teacher through Megatron's pipeline schedule; the planner gets one
loss per target. Logits are made at target positions only. What the teacher has scored once is remembered by content.

A row of the teacher is one sample: packed samples are read apart, as the student reads them.

Shapes: see :mod:`regate_megatron.teacher.rows`; b rows per teacher microbatch, H hidden, R rows of this rank in a step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.hooks import CurrentMicrobatch, DecoderHook
from regate_megatron.plan import MicrobatchPlan
from regate_megatron.teacher.rows import TeacherRows, grown, rows_for_teacher
from regate_megatron.topology import Topology


class ReferenceLosses:
    """Reference losses by content, computed by ``teacher`` when first asked for.

    Args:
        teacher: this rank's chunk of the frozen model.
        topology: the replica that runs it.
        visual, pad_token: see :func:`rows_for_teacher`.
    """

    def __init__(self, teacher: Any, topology: Topology, *, visual: str, pad_token: int | None) -> None:
        self.teacher, self.topology = teacher, topology
        self.visual, self.pad_token = visual, pad_token
        self.device = next(teacher.parameters()).device
        self.seconds = 0.0
        self._known: dict[tuple[int, int], Tensor] = {}
        self._current = CurrentMicrobatch()
        self._target_slot_bT: Tensor | None = None
        self._hook = DecoderHook(teacher, self._current, dense_layers=0, arrives_short=True)
        if teacher.post_process:
            teacher.output_layer.register_forward_pre_hook(self._targets_only)

    def fetch(self, facts: list[MicrobatchFacts] | None, micro_batch_size: int) -> list[Tensor] | None:
        """The losses of every sample's targets; all ranks of the replica call this.

        Args:
            facts: this step's microbatches on the planner, None elsewhere.
            micro_batch_size: b, rows per forward of the teacher.

        Returns:
            On the planner one float32 [T] per sample, in the order of its targets; None elsewhere.
        """
        start = time.perf_counter()
        request = self._share(self._level(self._missing(facts)) if self.topology.is_planner else None)
        if request is not None:
            losses = self._run(request, micro_batch_size)
            if self.topology.is_planner:
                counts = request.num_target_N.tolist()  # rows of other replicas' making come after those asked for
                for key, loss_T, count in zip(self._asked, losses, counts, strict=False):
                    self._known[key] = loss_T[:count].clone()
        self.seconds += time.perf_counter() - start
        if not self.topology.is_planner:
            return None
        return [self._known[key] for one in facts for key in _keys(one.reference_key_N2)]

    def describe(self) -> str:
        """One line: what the teacher is and what it has seen."""
        parameters = sum(parameter.numel() for parameter in self.teacher.parameters())
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
        return rows_for_teacher(*map(stack, names), visual=self.visual, pad_token=self.pad_token)

    def _level(self, request: TeacherRows | None) -> TeacherRows | None:
        """With expert parallelism, a request as large as any replica's: their experts meet in every layer.

        All planners call this, over their group, one small reduction; without expert parallelism none communicates.
        """
        if getattr(self.teacher.config, "expert_model_parallel_size", 1) == 1:
            return request
        own = request.sizes if request is not None else torch.zeros(5, dtype=torch.int64)
        sizes = self.topology.all_reduce_planners(own, "max")
        return grown(request, sizes) if int(sizes[0]) else None

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
        position_id_bK = rows.position_id_NK.to(device)
        with self._current.running(plan, None):
            output = model(
                rows.token_NK.to(device),
                position_id_bK.permute(2, 0, 1) if position_id_bK.dim() == 3 else position_id_bK,
                attention_mask=None,
                labels=rows.label_NT.to(device) if model.post_process else None,
            )
        return output, lambda losses, non_loss_data=True: losses

    def _targets_only(self, _layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: hidden states [K, b, H] at target positions, [T, b, H]."""
        hidden_KbH = inputs[0]
        index_TbH = self._target_slot_bT.t()[:, :, None].expand(-1, -1, hidden_KbH.shape[-1])
        return (hidden_KbH.gather(0, index_TbH), *inputs[1:])


def _keys(key_N2: Tensor) -> list[tuple[int, int]]:
    return [(first, second) for first, second in key_N2.tolist()]


def _microbatches(request: TeacherRows, size: int) -> list[TeacherRows]:
    """Cut a request into microbatches of ``size`` rows; the last is filled up with copies of its last row."""
    pieces = []
    for start in range(0, len(request), size):
        index = torch.arange(start, start + size).clamp_max(len(request) - 1)
        fields = {name: value[index] for name, value in vars(request).items() if torch.is_tensor(value)}
        pieces.append(TeacherRows(request.dense_length, **fields))
    return pieces
