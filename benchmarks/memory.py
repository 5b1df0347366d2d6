#!/usr/bin/env python3
"""Memory: what a step keeps for its backward, against the positions that run.

    python -m benchmarks.memory [--quick]

Counted, not sampled: the bytes of all distinct storages that autograd saves during the forward pass, model parameters
left out. That is what activations take at their peak, at the end of the forward pass. Resident memory would also show
the allocator, buffers of the math library and whatever ran before; it is not used here. One step each, no recompute;
the counts do not vary.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

from benchmarks import models
from benchmarks.measuring import figure, run_part
from benchmarks.models import Size


class SavedBytes:
    """Counts the bytes that autograd saves while it is entered; parameters are left out."""

    def __init__(self, model: Any) -> None:
        import torch

        self._known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._alive: list[Any] = []  # a storage that was freed could come back at the same address
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)
        self._alive.clear()

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._alive.append(storage)
            self.bytes += storage.nbytes()
        return tensor


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Dense, ours over keep ratios and dense layers, and the alternatives."""
    models.start()
    from benchmarks.kept import Compact, MaskTheLoss, PerLayer, Planned, random_plan

    size = Size(length=64, prompt=8, hidden=32, layers=3, vocab=64) if options.quick else Size()
    batch = models.make_batch(size, seed=0)

    def saved(kind: type, keep_ratio: float, dense_layers: int) -> tuple[int, int]:
        """Bytes, and positions of a row after the dense layers."""
        gc.collect()  # the model of the case before
        runner, plan = kind(size, dense_layers), random_plan(size, keep_ratio, seed=0)
        with SavedBytes(runner.model) as count:
            runner.step_on(batch, plan)
        return count.bytes, plan.length if kind in (Compact, PerLayer) else size.length

    dense, _ = saved(Planned, 1.0, 0)
    cases = [(Compact, keep, 1) for keep in (0.9, 0.75, 0.5, 0.25, 0.1)]
    cases += [(Compact, 0.5, 0), (Compact, 0.5, 2), (PerLayer, 0.5, 1), (MaskTheLoss, 0.5, 1)]
    rows, figures = [], [figure(f"dense, {size.rows}x{size.length}", "saved for backward", dense / 1e6, "MB")]
    for kind, keep_ratio, dense_layers in cases:
        count, length = saved(kind, keep_ratio, dense_layers)
        rows.append(
            {
                "way": kind.name,
                "keep_ratio": keep_ratio,
                "dense_layers": dense_layers,
                "positions_share": length / size.length,
                "saved_share": count / dense,
                "saved_mb": count / 1e6,
            }
        )
        setting = f"{kind.name}, keep {keep_ratio:g}, {dense_layers} of {size.layers} layers dense"
        beside = f"{count / 1e6:.1f} MB; positions run after the dense layers {length / size.length:.1%}"
        figures.append(figure(setting, "of dense", count / dense, "percent", beside=beside))
    return {"figures": figures, "rows": rows, "dense_mb": dense / 1e6}


if __name__ == "__main__":
    run_part("memory", __doc__, measure)
