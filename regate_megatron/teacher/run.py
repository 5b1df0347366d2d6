"""Run the sharded teacher forward-only through Megatron's pipeline schedule: rows in, one loss per target out.

Logits are made at target positions only: hidden states are gathered there before the output layer. Under context
parallelism every rank reads its slots and scores the targets that lie on them; the losses are then added up. The
teacher is cut into the same pipeline chunks as the student.

Shapes: see :mod:`regate_megatron.teacher.rows`; b rows per microbatch, k slots and t targets of this context rank, H
hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from regate_megatron.decoder import CurrentMicrobatch, DecoderHook, Layout, shard_plans
from regate_megatron.decoder.cutting import places
from regate_megatron.decoder.graphs import graphed
from regate_megatron.decoder.overlap import overlapping
from regate_megatron.decoder.rope_fusion import fusing, unfused
from regate_megatron.decoder.switches import switched_off
from regate_megatron.method.budget import align_up
from regate_megatron.method.plan import MicrobatchPlan
from regate_megatron.teacher.rows import TeacherRows


class TeacherRun:
    """A frozen model and how to run it, without what has buffers of the student's dense length.

    Args:
        chunks: this rank's chunks of the frozen model, in pipeline order.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = list(chunks)
        self.config = self.chunks[0].config
        self.device = next(parameter.device for chunk in self.chunks for parameter in chunk.parameters())
        self.layout = Layout.of_model(self.config, sequence_parallel=self.config.sequence_parallel)
        self._current = CurrentMicrobatch()
        self._targets: Targets | None = None
        self._hooks = [DecoderHook(one, self._current, dense_layers=0, arrives_short=True) for one in self.chunks]
        last = [one.output_layer for one in self.chunks if one.post_process]
        self._handles = [one.register_forward_pre_hook(self._targets_only) for one in last]
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        self._switches = [*overlapping(modules), *graphed(modules)]

    def detach(self) -> None:
        """Leave the model as it was: it may be the caller's."""
        while self._hooks:
            self._hooks.pop().detach()
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def __call__(self, request: TeacherRows, micro_batch_size: int) -> list[Tensor]:
        """Losses of every row on the last stage, float32 [T] each on the CPU; an empty list on other stages.

        All ranks of the replica call this.
        """
        microbatches, num_rows = self._microbatches(request, micro_batch_size)
        iterators = [iter(microbatches) for _ in self.chunks]
        is_interleaved = self.config.virtual_pipeline_model_parallel_size is not None
        attentions = fusing(module for chunk in self.chunks for module in chunk.modules()) if num_rows > 1 else []
        with switched_off(self._switches + unfused(attentions)):
            outputs = self._schedule()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if is_interleaved else iterators[0],
                model=self.chunks,
                num_microbatches=len(microbatches),
                seq_length=request.token_NK.shape[1],
                micro_batch_size=num_rows,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not self.chunks[-1].post_process:
            return []
        return list(torch.cat(outputs).float().cpu()[: len(request)])

    def _schedule(self) -> Any:
        from megatron.core.pipeline_parallel import schedules

        if self.config.pipeline_model_parallel_size == 1:
            return schedules.forward_backward_no_pipelining
        if self.config.virtual_pipeline_model_parallel_size is None:
            return schedules.forward_backward_pipelining_without_interleaving
        return schedules.forward_backward_pipelining_with_interleaving

    def _microbatches(self, request: TeacherRows, most_rows: int) -> tuple[list[TeacherRows], int]:
        """As many microbatches as an interleaved schedule takes, of at most ``most_rows`` rows, and how many rows.

        A request for a few missing rows is spread evenly, so that it costs what these rows cost; the last row repeats
        where the numbers do not divide.
        """
        count = -(-len(request) // most_rows)
        if self.config.virtual_pipeline_model_parallel_size is not None:
            group = self.config.microbatch_group_size_per_vp_stage
            count = -(-count // group) * group
        num_rows = -(-len(request) // count)
        index_N = torch.arange(count * num_rows).clamp_max(len(request) - 1)
        return [request.rows_at(index_b) for index_b in index_N.split(num_rows)], num_rows

    def _forward_step(self, microbatches: Any, model: Any) -> tuple[Tensor, Any]:
        rows: TeacherRows = next(microbatches)
        device, length = self.device, rows.token_NK.shape[1]
        is_real_bK = torch.arange(length) < rows.num_read_N[:, None]
        plan = MicrobatchPlan(rows.dense_length, rows.position_NK, is_real_bK)
        (sharded,) = shard_plans([plan], self.layout, device, moves_hidden=False, moves_tokens=False)
        slots_k = places(torch.tensor([length]), cp_size=self.layout.cp_size).positions_of(self.layout.cp_rank)
        layout = self.layout
        targets = targets_of(rows, layout.cp_size, layout.cp_rank, multiple=layout.sp_size).to(device)
        self._targets = targets
        with self._current.running(sharded, None):
            is_mrope = rows.position_id_NK.dim() == 3  # whose table the model cuts, or its hook
            position_ids = rows.position_id_NK.permute(2, 0, 1) if is_mrope else rows.position_id_NK[:, slots_k]
            output = model(
                rows.token_NK[:, slots_k].to(device),
                position_ids.to(device),
                attention_mask=None,
                labels=targets.label_bt if model.post_process else None,
            )
        return output, lambda loss_bt, non_loss_data=True: self._whole(loss_bt, targets)

    def _whole(self, loss_bt: Tensor, targets: Targets) -> Tensor:
        """The losses of all targets, [b, T]; the context group's ranks call this together."""
        loss_bt = loss_bt.float().masked_fill(~targets.is_real_bt, 0)
        loss_bT = loss_bt.new_zeros(len(loss_bt), targets.num_targets).scatter_add_(1, targets.index_bt, loss_bt)
        if self.layout.cp_size > 1:
            dist.all_reduce(loss_bT, group=self.layout.context_group)
        return loss_bT

    def _targets_only(self, _layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the output layer: hidden states [k, b, H] at target positions, [t, b, H]."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        hidden_kbH, layout = inputs[0], self.layout
        if layout.sp_size > 1:  # each tensor rank has its part, before and after
            hidden_kbH = gather_from_sequence_parallel_region(hidden_kbH)
        index_tbH = self._targets.slot_bt.t()[:, :, None].expand(-1, -1, hidden_kbH.shape[-1])
        return (hidden_kbH.gather(0, index_tbH).chunk(layout.sp_size)[layout.sp_rank], *inputs[1:])


def length_multiple(config: Any) -> int:
    """What K must be a multiple of in a model of this transformer config."""
    tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return tensor * (2 * config.context_parallel_size if config.context_parallel_size > 1 else 1)


@dataclass(frozen=True)
class Targets:
    """The targets of a microbatch that lie on this context rank; int64 [b, t], rows filled up at the end.

    Attributes:
        slot_bt: where in the k slots of this rank each is predicted.
        label_bt: the token it predicts.
        index_bt: which of the row's T targets it is.
        is_real_bt: False at fill.
        num_targets: T.
    """

    slot_bt: Tensor
    label_bt: Tensor
    index_bt: Tensor
    is_real_bt: Tensor
    num_targets: int

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return Targets(num_targets=self.num_targets, **moved)


def targets_of(rows: TeacherRows, cp_size: int, cp_rank: int, multiple: int = 1) -> Targets:
    """The targets that one context rank scores, t a multiple of ``multiple``."""
    num_rows, num_targets = rows.label_NT.shape
    cut = places(torch.tensor([rows.token_NK.shape[1]]), cp_size=cp_size)
    is_real_NT = torch.arange(num_targets) < rows.num_target_N[:, None]
    is_mine_NT = is_real_NT & (cut.rank_L[rows.target_slot_NT] == cp_rank)
    most = align_up(max(1, int(is_mine_NT.sum(dim=1).max())), multiple)
    # A stable sort puts this rank's targets first, in order.
    index_Nt = is_mine_NT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    fill = most - index_Nt.shape[1]
    return Targets(
        slot_bt=pad(cut.index_L[rows.target_slot_NT].gather(1, index_Nt), (0, fill)),
        label_bt=pad(rows.label_NT.gather(1, index_Nt), (0, fill)),
        index_bt=pad(index_Nt, (0, fill)),
        is_real_bt=pad(is_mine_NT.gather(1, index_Nt), (0, fill)),
        num_targets=num_targets,
    )
