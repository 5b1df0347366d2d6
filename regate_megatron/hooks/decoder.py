"""Compact once, run short to the end: the decoder with the first ``n`` layers dense and the rest on kept positions.

An inactive token takes part in no elided layer, so for causal attention and token-wise MLPs those layers are exactly
dense layers on the kept positions in order, with their original positions in the rotary embedding. The block's own
forward is run twice, over two ranges of its layers; in between the hidden states are gathered, once per microbatch.
Each range is the framework's forward with its recompute, quantisation and offload contexts; what the short range needs
(rotary frequencies, attention mask) goes in as arguments, so recompute is safe.

Means: an instance attribute ``forward`` on the block. Layer hooks would run once per layer and again in recompute, and
a module spec would change what users configured.

Shapes: S dense positions, K slots that run, k those of this context rank, B rows, D rotary.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from regate_megatron.errors import refuse
from regate_megatron.hooks.current import CurrentMicrobatch
from regate_megatron.hooks.shards import ShardedPlan


class LayerRange:
    """A view of a transformer block that has some of its layers; every other attribute is the block's own.

    The block's ``forward`` runs on it unbound, and so does recompute, which keeps it in its closure.
    """

    def __init__(self, block: Any, start: int, stop: int, *, takes_input: bool, is_end: bool) -> None:
        self._block = block
        self.layers = list(block.layers)[start:stop]
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.pre_process = takes_input  # whether hidden states come as an argument or from the previous stage
        self.final_layernorm = block.final_layernorm if is_end else None
        self.config = block.config
        if start and block.config.recompute_method == "block":
            # "block" recomputes the first N layers of a stage: the dense range has used up some of them.
            self.config = copy.copy(block.config)
            self.config.recompute_num_layers = max(0, block.config.recompute_num_layers - start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class DecoderHook:
    """Compaction of one model chunk's decoder.

    Args:
        model: the language model (``GPTModel``); its ``decoder`` gets the hook.
        current: where the plan of the forward in progress is found.
        dense_layers: layers that see every position; all of them lie in the first chunk.
        arrives_short: the model's input holds kept positions only (the teacher's does).
    """

    def __init__(
        self, model: Any, current: CurrentMicrobatch, *, dense_layers: int, arrives_short: bool = False
    ) -> None:
        self.model, self.block, self.current = model, model.decoder, current
        self.is_first_chunk = self.block.pre_process
        self.compacts = self.is_first_chunk and not arrives_short
        num_dense = dense_layers if self.compacts else 0
        self.num_dense_here = num_dense
        self.dense = LayerRange(self.block, 0, num_dense, takes_input=True, is_end=False)
        self.short = LayerRange(
            self.block, num_dense, len(self.block.layers), takes_input=self.is_first_chunk, is_end=True
        )
        self._forward = type(self.block).forward
        self._signature = inspect.signature(self._forward)
        self._frequencies: dict[int, Tensor] = {}
        self.block.forward = self.forward

    def detach(self) -> None:
        """Give the block its own forward back."""
        del self.block.forward

    def describe(self) -> str:
        """One line: what is attached where."""
        layers = len(self.block.layers)
        first = self.block.layers[0].layer_number if layers else 0
        where = f"layers {first}-{first + layers - 1}" if layers else "no layers"
        if self.compacts:
            return f"decoder ({where}): compacts after {self.num_dense_here} dense layers"
        return f"decoder ({where}): arrives short"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; short after the dense layers when the current plan says so."""
        plan = self.current.plan
        if plan is None:
            return self._forward(self.block, *args, **kwargs)
        arguments = self._signature.bind(self.block, *args, **kwargs).arguments
        arguments.pop("self")
        if self.num_dense_here:
            arguments["hidden_states"] = self._forward(self.dense, **arguments)
        if self.compacts:
            check_length("hidden states", arguments["hidden_states"].shape[0], plan.local_length)
            arguments["hidden_states"] = plan.hidden.to_short(arguments["hidden_states"])
        if arguments.get("rotary_pos_emb") is not None:
            arguments["rotary_pos_emb"] = self._rotary(plan)
        if arguments.get("attention_mask") is not None:
            arguments["attention_mask"] = _short_mask(arguments["attention_mask"], plan)
        if arguments.get("packed_seq_params") is not None:
            arguments["packed_seq_params"] = _short_packing(arguments["packed_seq_params"], plan)
        return self._forward(self.short, **arguments)

    def _rotary(self, plan: ShardedPlan) -> Tensor:
        """Rotary frequencies of this rank's slots at their original places, [k, B, 1, D]."""
        frequencies_S11D = self._frequencies.get(plan.rotary_length)
        if frequencies_S11D is None:
            frequencies_S11D = self.model.rotary_pos_emb.get_emb(plan.rotary_length)
            if isinstance(frequencies_S11D, tuple):  # yarn returns its attention scale beside them
                frequencies_S11D = frequencies_S11D[0]
            self._frequencies = {plan.rotary_length: frequencies_S11D.to(plan.place_Bk.device)}
        return self._frequencies[plan.rotary_length][:, 0, 0][plan.place_Bk.t()][:, :, None]


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
            change="the batch adapter, or train without --regate",
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
    """
    pads = params.cu_seqlens_q_padded is not None
    lengths = plan.cu_seqlens if pads or not plan.is_packed else plan.cu_seqlens_padded
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
