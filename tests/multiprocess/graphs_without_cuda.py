"""Megatron's own ("local") CUDA graphs where there is no CUDA: all of its bookkeeping is real, captures are not.

Which call goes to which manager, what is recorded and in which order, which runner a call gets, whether its arguments
are those of the recording, and whether a backward comes between two forwards, is Megatron's. What stands in: a capture
does nothing, and a replay runs the module.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.cuda_graphs import CudaGraphManager, _CudagraphRecordNode, _CudaGraphRunner

SCOPE = "cuda_graph_modules" if hasattr(cuda_graphs, "CudaGraphModule") else "cuda_graph_scope"  # core 0.17

recorded: list[str] = []
captured: list[str] = []
replayed: list[str] = []


def install() -> None:
    """For the rest of the process."""
    torch.cuda.graph_pool_handle = lambda: (0, 0)
    cuda_graphs.get_cuda_rng_tracker = lambda: SimpleNamespace(is_inference_rng_tracker=True)  # as graphs ask for
    record = cuda_graphs._CudagraphGlobalRecord
    noted = record.record_fwd_graph.__func__

    def record_fwd_graph(cls, runner, *args):
        recorded.append(_name(runner))
        return noted(cls, runner, *args)

    record.record_fwd_graph = classmethod(record_fwd_graph)
    _CudaGraphRunner.create_fwd_graph = lambda self, *args, **kwargs: captured.append(_name(self))
    _CudaGraphRunner.create_bwd_graph = lambda self: None
    _CudaGraphRunner.replay_graph_capture = _replay


def forget() -> None:
    """As in a new process."""
    record = cuda_graphs._CudagraphGlobalRecord
    record.cudagraph_created, record.cudagraph_record = False, []
    for names in (recorded, captured, replayed):
        names.clear()


def take() -> tuple[int, int, int]:
    """How many graphs were recorded, captured and replayed since the last call."""
    counts = len(recorded), len(captured), len(replayed)
    for names in (recorded, captured, replayed):
        names.clear()
    return counts


def managers(model: torch.nn.Module) -> list[CudaGraphManager]:
    """All that a model has."""
    return [one for one in model.modules() if isinstance(one, CudaGraphManager)]


def _replay(self, is_first_microbatch, args, kwargs):
    errors = self.get_mismatch_errors(args, kwargs)
    assert not errors, errors
    replayed.append(_name(self))
    out = self.func(*args, **kwargs)
    first, *rest = out if isinstance(out, tuple) else (out,)
    return _CudagraphRecordNode.apply(self, first), *rest


def _name(runner: _CudaGraphRunner) -> str:
    return f"{type(runner.base_module).__name__} {runner.base_module.layer_number}"
