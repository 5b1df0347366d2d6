"""All hooks on this rank's language-model chunks, and the framework's schedule run through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from regate_megatron.config import ReGateConfig
from regate_megatron.decoder.ahead import AheadHook
from regate_megatron.decoder.compaction import DecoderHook
from regate_megatron.decoder.current import CurrentMicrobatch, Observer
from regate_megatron.decoder.exchange import Layout, ShardedPlan, shard_plans
from regate_megatron.decoder.graphs import graphed
from regate_megatron.decoder.losses import LossHook
from regate_megatron.decoder.overlap import overlapping
from regate_megatron.decoder.pipeline import check_arguments, shapes_from
from regate_megatron.decoder.rope_fusion import fusing, unfused
from regate_megatron.decoder.switches import Switch, switched_off
from regate_megatron.errors import refuse
from regate_megatron.method.plan import StepPlan


class Hooks:
    """A decoder hook on every chunk and a loss hook on the last one.

    Args:
        language_models: this rank's chunks, unwrapped.
        config: the settings.
        chunks: this rank's chunks of the whole model, where the language model is a part of it.

    Attributes:
        layout: this rank's place among those that share a sequence.
        has_pipeline: whether the decoder is cut into stages.
        has_one_dense_length: whether the host sends states of one shape between them in dense steps.
        predicts_ahead: whether the model predicts more than the next token, on whichever stage.
    """

    def __init__(
        self, language_models: Sequence[Any], config: ReGateConfig, chunks: Sequence[Any] | None = None
    ) -> None:
        transformer = language_models[0].config
        self.models, self.config = language_models, config
        self._chunks = language_models if chunks is None else chunks
        self.layout = Layout.of_model(transformer, sequence_parallel=transformer.sequence_parallel)
        self.has_pipeline = transformer.pipeline_model_parallel_size > 1
        self.has_one_dense_length = self.has_pipeline and not transformer.variable_seq_lengths
        self.predicts_ahead = bool(getattr(transformer, "mtp_num_layers", None))
        self.decoders: list[DecoderHook] = []
        self.losses: list[LossHook] = []
        self.ahead: list[AheadHook] = []
        self._current = CurrentMicrobatch()
        # What sparse steps switch off: where short sequences would go through user buffers, all CUDA graphs, and fusion
        # in attentions of short layers, whose kernel would count positions itself.
        self._overlapping: list[Switch] = []
        self._graphed: list[Switch] = []
        self._fusing: list[Any] = []

    def attach(self) -> None:
        """Put them on."""
        dense = {"dense_layers": self.config.dense_layers, "dense_last_layers": self.config.dense_last_layers}
        for model in self.models:
            self.decoders.append(DecoderHook(model, self._current, **dense))
            if model.post_process:
                self.losses.append(LossHook(model, self._current))
            if getattr(model, "mtp_process", False):
                self.ahead.append(AheadHook(model, self._current, self.decoders[-1], self.losses[-1]))
        self._overlapping = [switch for hook in self.decoders for switch in overlapping(hook.short_modules())]
        self._graphed = [switch for chunk in self._chunks for switch in graphed(chunk.modules())]
        self._fusing = [one for hook in self.decoders for one in fusing(hook.short_modules())]

    def detach(self) -> None:
        """Take them off again, last first."""
        self._overlapping, self._graphed, self._fusing = [], [], []
        for kind in (self.ahead, self.losses, self.decoders):
            while kind:
                kind.pop().detach()

    def describe(self) -> list[str]:
        """What is attached where, one line per hook, and what sparse steps switch off."""
        lines = [hook.describe() for hook in (*self.decoders, *self.losses, *self.ahead)]
        if count := len({id(one.module) for one in self._overlapping}):
            lines.append(f"tensor-parallel communication overlap is off in sparse steps in {count} short modules")
        if self._graphed:
            lines.append("CUDA graphs are off in sparse steps, in all of the model")
        if self._fusing:
            rows = "where rows are packed, or several in a microbatch"
            lines.append(f"fused RoPE is off in sparse steps in {len(self._fusing)} short attentions {rows}")
        return lines

    def check_rows(self, longest: int, *, is_packed: bool) -> None:
        """Refuse rows where the model itself gives them other positions than theirs.

        Args:
            longest: the longest row, or segment of a packed one, dense.

        Raises:
            ReGateError: on the rank that asks.
        """
        for hook in self.decoders:
            hook.positions.check_length(longest)
        if is_packed and self.layout.cp_size > 1 and any(hook.positions.cuts_rows_whole for hook in self.decoders):
            raise refuse(
                "packed rows",
                given="mrope and context parallelism in Megatron-Core's own GPTModel",
                allowed="one of the two, as it cuts the rotary table of a packed row as if it were one segment",
                change="--context-parallel-size to 1",
            )

    def run(
        self,
        schedule: Callable[..., Any],
        arguments: dict[str, Any],
        batches: list[list[Any] | None],
        plans: Sequence[ShardedPlan],
        observe: Observer | None,
        norms: dict[int, Tensor] | None = None,
    ) -> Any:
        """Run ``schedule`` with ``arguments`` over fresh copies of ``batches``, short where ``plans`` say so.

        Args:
            batches: per data iterator the step's microbatches, or None where this rank has none.
            plans: from :meth:`lay_out`.
            observe: is called with the per-token losses of each microbatch, on ranks that compute them.
            norms: where dense steps are watched, gets by microbatch the norms of :mod:`.gradients`, float32 [L, B], on
                the device, on ranks that compact.
        """
        iterators = [None if pulled is None else iter([_fresh(batch) for batch in pulled]) for pulled in batches]
        is_list = isinstance(arguments["data_iterator"], list)
        step = arguments["forward_step_func"]
        done: dict[int, int] = {}

        def forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            index = done.get(id(model), 0)
            done[id(model)] = index + 1
            watch = None if norms is None else partial(norms.__setitem__, index)
            with self._current.running(plans[index] if plans else None, observe, watch):
                return step(data_iterator, model, *args, **kwargs)

        own = {"data_iterator": iterators if is_list else iterators[0], "forward_step_func": forward_step}
        arguments = dict(arguments, **own)
        if self.has_pipeline:
            check_arguments(arguments)
        with contextlib.ExitStack() as stack:
            if plans:
                switches = self._overlapping + self._graphed
                if any(plan.is_packed or len(plan.keep_idx_BK) > 1 for plan in plans):
                    switches = switches + unfused(self._fusing)
                stack.enter_context(switched_off(switches))
                if self.has_pipeline:
                    arguments = stack.enter_context(shapes_from(plans, self.layout, len(self.models), arguments))
            return schedule(**arguments)

    def lay_out(self, plan: StepPlan, loss_masks: Sequence[Tensor] = ()) -> list[ShardedPlan]:
        """This rank's part of every microbatch's plan, on its device; nothing in a dense step. No communication.

        Args:
            loss_masks: of the batches, before elision, [B, S] each, where the model predicts ahead.
        """
        device = next(self.models[0].parameters()).device
        moves = {
            "moves_hidden": any(hook.compacts for hook in self.decoders),
            "moves_tokens": bool(self.losses) or any(hook.moves_tokens for hook in self.decoders),
            "comes_back": any(hook.comes_back for hook in self.decoders),
        }
        shards = shard_plans(plan.microbatches, self.layout, device, **moves)
        if not self.ahead:
            return shards
        masks = [mask_BS.to(device, non_blocking=True) for mask_BS in loss_masks]
        return [replace(one, loss_mask_BS=mask_BS) for one, mask_BS in zip(shards, masks, strict=True)]


def _fresh(batch: Any) -> Any:
    """A shallow copy: the framework's batch code empties the dict it is given."""
    return dict(batch) if isinstance(batch, dict) else batch
