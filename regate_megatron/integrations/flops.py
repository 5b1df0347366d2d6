"""Megatron's FLOP counts, told what was left out.

Megatron computes FLOPs from the dense length, so that a sparse step, being shorter, would look like a faster GPU. Its
formula is kept and its result multiplied by the share of the decoder's work that ran. The share comes from the same
formula: in the sequence length it is a·S + b·S², where a falls into layers and logits, and each of the three parts
shrinks with a count of its own (layer-positions, layer-squares, positions).

Who reads the corrected number: ``throughput per GPU`` in the log line, in TensorBoard, W&B and one-logger, the progress
log, and ``num_floating_point_operations_so_far`` in checkpoints. The teacher's forward and a vision tower are not in
Megatron's number, nor in ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from regate_megatron.metrics import Counters


def share_of_dense(formula: Callable[..., float], args: Any, work: Counters) -> float:
    """The share of dense FLOPs that ran, in (0, 1]; 1 where nothing was counted.

    Args:
        formula: Megatron's ``num_floating_point_operations``.
        args: Megatron's namespace; left alone.
        work: the lengths of one or several steps.
    """
    if not work.layer_squares_dense:
        return 1.0
    length = work.layer_squares_dense / work.layer_positions_dense  # S where all rows have one dense length

    def flops(seq_length: float, vocab_size: int) -> float:
        changed = copy.copy(args)
        changed.seq_length, changed.padded_vocab_size = seq_length, vocab_size
        return formula(changed, 1)

    dense, layers = flops(length, args.padded_vocab_size), flops(length, 0)
    squares = 2 * (layers - 2 * flops(length / 2, 0))
    ran = (
        (layers - squares) * work.layer_positions_run / work.layer_positions_dense
        + squares * work.layer_squares_run / work.layer_squares_dense
        + (dense - layers) * work.positions_run / work.positions_dense
    )
    return ran / dense
