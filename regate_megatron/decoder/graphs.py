"""CUDA graphs of layers and of their parts, off for the whole of a sparse step.

A graph replays kernels on buffers as long as the sequence it was captured with. Whether a call goes through one the
layer asks itself each time: it has a method for Megatron's own graphs ("local"), an attribute that says whether parts
of an expert layer do, and a list of Transformer Engine's graphs, which others look at, too. So a sparse step runs as
Megatron's own do before there is a graph, and dense steps replay as ever.

All of the model is without, dense layers and towers as well, for what Megatron's own graphs rely on:

- The first training step whose layers ask for graphs records all there will ever be, in their order. A sparse step
  records nothing, so they are made of the first dense one.
- A graph takes what the one before it left in place, and refuses any other tensor: the last dense layers could not
  follow short ones. Graphs share memory by the order in which they were recorded.

Transformer Engine's graphs are made between two steps, of the layers alone at the dense length: no step is a matter.

What ran in a graph has left no trace in Python, yet the dispatcher of an expert layer goes by what it noted when the
graph was captured (shapes, say). A short run would leave other notes, so it has a dispatcher of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from regate_megatron.decoder.switches import Switch
from regate_megatron.errors import refuse

_ASKED = "_should_call_local_cudagraph"
_WHOLE = ("route", "expert_compute", "postprocess")  # what an expert layer does where it has no graphs


def graphed(modules: Iterable[nn.Module]) -> list[Switch]:
    """What to switch off so that no call of the modules goes through a CUDA graph.

    Raises:
        ReGateError: a module that has graphs and does not ask whether a call goes through one; on the rank that has it.
    """
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    switches = []
    for module in modules:
        # One without a backward is inference's.
        managers = [one for one in module.children() if isinstance(one, CudaGraphManager) and one.need_backward]
        if not managers and not hasattr(module, "cuda_graphs"):
            continue
        has_parts = any(one.func is not None for one in managers)
        if (managers and not hasattr(module, _ASKED)) or has_parts > hasattr(module, "use_partial_cudagraphs"):
            raise refuse(
                "CUDA graphs",
                given=f"a {type(module).__name__} that has some",
                allowed="Megatron-Core's layers, which ask themselves whether a call goes through one",
                change="--cuda-graph-impl to none",
            )
        switches.append(Switch(module, _ASKED, _never) if managers else Switch(module, "cuda_graphs", []))
        experts = getattr(module, "mlp", None)
        if hasattr(experts, "token_dispatcher"):
            switches.append(Switch(experts, "token_dispatcher", _another(experts.token_dispatcher)))
        if has_parts:
            switches.append(Switch(module, "use_partial_cudagraphs", False))
            switches.append(Switch(experts, "fwd_execution_map", list(_WHOLE)))
            switches.append(Switch(experts, "moe_layer_recompute", module.moe_layer_recompute))  # else the layer's
    return switches


def _never(*_: Any, **__: Any) -> bool:
    return False


def _another(dispatcher: Any) -> Any:
    """A dispatcher with notes of its own; groups, streams and shared experts are the same ones."""
    dispatcher = copy.copy(dispatcher)
    if hasattr(dispatcher, "_comm_manager"):
        dispatcher._comm_manager = copy.copy(dispatcher._comm_manager)
    return dispatcher
