"""Compact once, run short: the decoder with the first ``n`` layers dense and the rest on kept positions.

An inactive token takes part in no elided layer, so for causal attention and token-wise MLPs those layers are exactly
dense layers on the kept positions in order, with their original positions in the rotary embedding. The block's own
forward is run twice, over two ranges of its layers; in between the hidden states are gathered, once per microbatch.
Each range is the framework's forward with its recompute, quantisation and offload contexts; what the short range needs
(rotary frequencies, attention mask) goes in as arguments, so recompute is safe.

The last layers may see every position again (``dense_last_layers``): elided positions then come back with the hidden
states they left with, and kept ones alone go on to the LM head.

Means: an instance attribute ``forward`` on the block. Layer hooks would run once per layer and again in recompute, and
a module spec would change what users configured.

Shapes: S dense positions, K slots that run, k those of this context rank, L and l this rank's parts of S and K, B rows,
H hidden.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from regate_megatron.config import flag
from regate_megatron.decoder import deepstack
from regate_megatron.decoder.current import CurrentMicrobatch, Watcher
from regate_megatron.decoder.exchange import ShardedPlan
from regate_megatron.decoder.experts import Experts
from regate_megatron.decoder.gradients import watched
from regate_megatron.decoder.hybrid import HybridRange, is_hybrid
from regate_megatron.decoder.positions import Positions
from regate_megatron.decoder.ranges import LayerRange
from regate_megatron.errors import refuse


class DecoderHook:
    """Compaction of one model chunk's decoder.

    Args:
        model: the language model (``GPTModel`` or ``HybridModel``); its ``decoder`` gets the hook.
        current: where the plan of the forward in progress is found.
        dense_layers: first layers that see every position; all of them lie in the first chunk.
        dense_last_layers: last layers that see every position again, in a model of one chunk.
        arrives_short: the model's input holds kept positions only (the teacher's does).
    """

    def __init__(
        self,
        model: Any,
        current: CurrentMicrobatch,
        *,
        dense_layers: int,
        dense_last_layers: int = 0,
        arrives_short: bool = False,
    ) -> None:
        self.model, self.block, self.current = model, model.decoder, current
        self.is_first_chunk = self.block.pre_process
        self.compacts = self.is_first_chunk and not arrives_short
        num_dense = dense_layers if self.compacts else 0
        self.num_dense_here = num_dense
        self.num_dense_last = dense_last_layers
        self.stop = len(self.block.layers) - dense_last_layers
        is_end = not dense_last_layers
        self.dense = self._range(0, num_dense, takes_input=True)
        self.short = self._range(num_dense, self.stop, takes_input=self.is_first_chunk, is_end=is_end)
        self.last = self._range(self.stop, len(self.block.layers), takes_input=True, is_end=True)
        self._forward = type(self.block).forward
        self._signature = inspect.signature(self._forward)
        self._rest = [one.name for one in self._signature.parameters.values() if one.kind is one.VAR_KEYWORD]
        self._takes_padding = "padding_mask" in _own_signature(type(self.block)).parameters
        self.positions = Positions(model, arrives_short=arrives_short)
        self.experts = Experts(self.block.config, self.block.layers)
        self.block.forward = self.forward

    def detach(self) -> None:
        """Give the block its own forward back."""
        self.positions.detach()
        self.experts.detach()
        del self.block.forward

    def describe(self) -> str:
        """One line: what is attached where."""
        layers = len(self.block.layers)
        first = self.block.layers[0].layer_number if layers else 0
        where = f"layers {first}-{first + layers - 1}" if layers else "no layers"
        if self.compacts:
            end = f", the last {self.num_dense_last} are dense again" if self.comes_back else ""
            return f"decoder ({where}): compacts after {self.num_dense_here} dense layers{end}"
        return f"decoder ({where}): arrives short"

    def short_modules(self) -> Iterator[Any]:
        """Every module of the model that a short sequence goes through: all but those of the dense layers."""
        dense = {id(one) for layer in (*self.dense.layers, *self.last.layers) for one in layer.modules()}
        return (one for one in self.model.modules() if id(one) not in dense)

    @property
    def moves_tokens(self) -> bool:
        """Whether the chunk gets something with every microbatch that lies along the tokens, as labels do."""
        return self.positions.is_dense_given or self.experts.moves_mask

    @property
    def comes_back(self) -> bool:
        """Whether the last layers see every position again."""
        return self.num_dense_last > 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; short after the dense layers when the current plan says so."""
        plan, watch = self.current.plan, self.current.watch if self.compacts else None
        self.experts.check(kwargs.get("padding_mask"), kwargs.get("hidden_states", args[0] if args else None))
        if plan is None and watch is None:
            return self._forward(self.block, *args, **kwargs)
        arguments = self._signature.bind(self.block, *args, **kwargs).arguments
        arguments.pop("self")
        for name in self._rest:
            arguments |= arguments.pop(name, {})
        with self._one_region():
            return self._all_watched(arguments, watch) if plan is None else self._dense_then_short(arguments, plan)

    def _one_region(self) -> Any:
        """One FP8 region round all ranges: delayed scaling rolls and reduces its amax history once per region."""
        config = self.block.config
        if not config.fp8 or config.fp8_recipe != "delayed":
            return nullcontext()
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(config)

    def _all_watched(self, arguments: dict[str, Any], watch: Watcher) -> Any:
        """Every position through every layer; the gradient between the dense range and the next is watched."""
        later = deepstack.take_later(arguments, self.num_dense_here, self.block)
        if self.num_dense_here:
            arguments["hidden_states"] = self._forward(self.dense, **arguments)
        deepstack.drop(arguments)
        arguments["hidden_states"] = watched(arguments["hidden_states"], watch)
        arguments["hidden_states"] = self._run_short(arguments, later)
        return self._forward(self.last, **arguments) if self.comes_back else arguments["hidden_states"]

    def _range(self, start: int, stop: int, *, takes_input: bool, is_end: bool = False) -> LayerRange:
        range_of = HybridRange if is_hybrid(self.block) else LayerRange
        return range_of(self.block, start, stop, takes_input=takes_input, is_end=is_end)

    def _dense_then_short(self, arguments: dict[str, Any], plan: ShardedPlan) -> Any:
        later = deepstack.take_later(arguments, self.num_dense_here, self.block)
        if self.num_dense_here:
            arguments["hidden_states"] = self._forward(self.dense, **arguments)
        if self.compacts:
            check_length("hidden states", arguments["hidden_states"].shape[0], plan.local_length)
        deepstack.drop(arguments)
        short = self._short_arguments(arguments, plan)
        later = [plan.hidden.to_short(one_LBH) for one_LBH in later]
        dense_LBH = arguments.pop("hidden_states")
        if not self.comes_back:
            del dense_LBH  # its memory is free while the short layers run
            return self._run_short(short, later)
        arguments["hidden_states"] = plan.put_back(dense_LBH, self._run_short(short, later))
        return plan.hidden.to_short(self._forward(self.last, **arguments))

    def _run_short(self, short: dict[str, Any], later: list[Tensor]) -> Any:
        """The short layers; each of the first ones adds what ``later`` has for it, [l, B, H], to its output.

        Raises:
            ReGateError: a layer that would is among the last dense ones.
        """
        padding_mask = None if self._takes_padding else short.pop("padding_mask", None)

        def run(layers: LayerRange) -> Any:
            return self._forward(layers if padding_mask is None else layers.with_padding(padding_mask), **short)

        first = self.num_dense_here
        if not later:
            return run(self.short)
        if first + len(later) > self.stop:
            raise refuse(
                flag("dense_last_layers"),
                given=f"{self.num_dense_last} in a decoder that adds visual features after layer {first + len(later)}",
                allowed=f"layers from {first + len(later)} on",
                change="it to a smaller number",
            )
        for index, feature_lBH in enumerate(later, first):
            short["hidden_states"] = run(self._range(index, index + 1, takes_input=True)) + feature_lBH
        return run(self._range(first + len(later), self.stop, takes_input=True, is_end=not self.num_dense_last))

    def _short_arguments(self, arguments: dict[str, Any], plan: ShardedPlan) -> dict[str, Any]:
        """The block's arguments at the kept positions."""
        arguments = dict(arguments)
        if self.compacts:
            arguments["hidden_states"] = plan.hidden.to_short(arguments["hidden_states"])
        padding_mask = self.experts.padding(arguments.pop("padding_mask", None), plan)
        if padding_mask is not None:
            arguments["padding_mask"] = padding_mask
        return self.attended(arguments, plan)

    def attended(self, arguments: dict[str, Any], plan: ShardedPlan) -> dict[str, Any]:
        """The same arguments, changed in place, with what attention gets of them at the kept positions."""
        arguments["rotary_pos_emb"] = self.positions.rotary(arguments.get("rotary_pos_emb"), plan)
        if arguments.get("attention_mask") is not None:
            arguments["attention_mask"] = _short_mask(arguments["attention_mask"], plan)
        if arguments.get("packed_seq_params") is not None:
            arguments["packed_seq_params"] = _short_packing(arguments["packed_seq_params"], plan)
        return arguments


def _own_signature(block: type) -> inspect.Signature:
    """Of the first forward that names its arguments: one that hands all on is the next class's."""
    for one in block.__mro__:
        signature = inspect.signature(one.forward)
        if not any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()):
            break
    return signature


def check_length(what: str, found: int, planned: int) -> None:
    """The model's sequence must be as long as the planner read it, or positions would mean something else.

    Raises:
        ReGateError: on the rank that sees it.
    """
    if found != planned:
        raise refuse(
            what,
            given=f"{found} positions where the batch was read as {planned}",
            allowed="the merged rows of pretrain_gpt.py and pretrain_vlm.py",
            change="the batches to that layout, or train without --regate",
        )


def _short_mask(mask: Tensor, plan: ShardedPlan) -> Tensor | None:
    """Rows and columns of an attention mask (True is hidden) at the kept positions; [1 or B, 1, S, S] -> [B, 1, K, K].

    What lies above the diagonal stays hidden: fill slots repeat a position that kept ones may read. Under context
    parallelism attention is causal by its type and reads no mask.
    """
    if plan.cp_size > 1:
        return None
    check_length("attention mask", mask.shape[-2], plan.dense_length)
    keep_idx_BK = plan.keep_idx_BK
    num_rows, length = keep_idx_BK.shape
    mask_BSS = mask[:, 0].expand(num_rows, -1, -1)
    row_B11 = torch.arange(num_rows, device=mask.device)[:, None, None]
    mask_BKK = mask_BSS[row_B11, keep_idx_BK[:, :, None], keep_idx_BK[:, None, :]]
    later_KK = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu_(1)
    return (mask_BKK.bool() | later_KK)[:, None]


def _short_packing(params: Any, plan: ShardedPlan) -> Any:
    """Packing parameters for the slots: real ones per row or segment, and with the fill that ends each.

    Where the dense run padded nothing between segments, fill is a part of its segment: no kept slot reads it.

    Raises:
        ReGateError: segments that the plan knows nothing of.
    """
    is_one_row, pads = params.qkv_format == "thd", params.cu_seqlens_q_padded is not None
    if is_one_row and len(params.cu_seqlens_q) > 2 and not plan.is_packed:
        raise refuse(
            "packed rows",
            given=f"{len(params.cu_seqlens_q) - 1} segments of which the batch says nothing",
            allowed="one, or batches that say where samples start",
            change="the batches, or train without --regate",
        )
    lengths = plan.cu_seqlens_padded if is_one_row and not pads else plan.cu_seqlens
    padded = plan.cu_seqlens_padded if pads else None
    return dataclasses.replace(
        params,
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=plan.max_length,
        max_seqlen_kv=plan.max_length,
    )
