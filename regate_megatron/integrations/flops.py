"""Megatron's FLOP counts, told what was left out.

Megatron computes FLOPs from the dense length, so that a sparse step, being shorter, would look like a faster GPU. Its
formula is kept and its result multiplied by the share of the decoder's work that ran. The share comes from the same
formula: in the sequence length S it is a·S + b·S² for the layers, plus logits that grow with S. Layers that see every
position count at dense lengths, the others and the logits at those that ran. In a HybridModel each of the two has the
formula of its own layers; in a GPTModel all layers count alike.

Who reads the corrected number: ``throughput per GPU`` in the log line, in TensorBoard, W&B and one-logger, the progress
log, and ``num_floating_point_operations_so_far`` in checkpoints. The teacher's forward and a vision tower are not in
Megatron's number, nor in ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regate_megatron.config import ReGateConfig
from regate_megatron.step.counters import Counters


def share_of_dense(formula: Callable[..., float], args: Any, work: Counters, config: ReGateConfig) -> float:
    """The share of dense FLOPs that ran, in (0, 1]; 1 where nothing was counted.

    Args:
        formula: Megatron's ``num_floating_point_operations``.
        args: Megatron's namespace; left alone.
        work: the lengths of one or several steps.
        config: which layers see every position.
    """
    if not work.layer_squares_dense:
        return 1.0
    reference = work.layer_squares_dense / work.layer_positions_dense  # any length would do

    def flops(length: float, **changes: Any) -> float:
        changed = copy.copy(args)
        vars(changed).update(changes, seq_length=length)
        return formula(changed, 1)

    def costs(**changes: Any) -> Tensor:
        """What one position and one squared length cost in the layers; [2]."""
        whole, half = (flops(length, padded_vocab_size=0, **changes) for length in (reference, reference / 2))
        squares = 2 * (whole - 2 * half)
        return torch.tensor([(whole - squares) / reference, squares / reference**2], dtype=torch.float64)

    num_layers = work.layer_positions_dense / work.positions_dense
    num_long = config.dense_layers + config.dense_last_layers
    every = costs()
    if (pattern := getattr(args, "hybrid_layer_pattern", None)) is None:
        long = costs(mtp_num_layers=None) * num_long / num_layers  # layers that predict ahead come after all of them
    else:
        kinds = pattern.split("/")[0].replace("|", "")
        kinds = kinds[: config.dense_layers] + kinds[len(kinds) - config.dense_last_layers :]
        long = costs(hybrid_layer_pattern=kinds) if kinds else 0 * every
    squares = work.layer_squares_dense / num_layers
    squares_run = (work.layer_squares_run - num_long * squares) / (num_layers - num_long)
    dense = torch.tensor([work.positions_dense, squares], dtype=torch.float64)
    ran = torch.tensor([work.positions_run, squares_run], dtype=torch.float64)
    logits = (flops(reference) - flops(reference, padded_vocab_size=0)) / reference
    in_all = every @ dense + logits * work.positions_dense
    return float((long @ dense + (every - long) @ ran + logits * work.positions_run) / in_all)
