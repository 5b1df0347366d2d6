"""What a layout asks of kept lengths, from the language model's transformer config."""

from __future__ import annotations

import math
from typing import Any


def length_alignment(model: Any) -> int:
    """What kept lengths must be a multiple of: what context and sequence parallelism cut, and FP8's matrix sizes."""
    context = model.context_parallel_size
    slices = context * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    if model.fp8:
        from megatron.core.fp8_utils import get_fp8_align_size

        # The rows of a rank's matrices, b·K/(CP·TP), must divide by the size; a K that does alone serves every b.
        slices *= get_fp8_align_size(model.fp8_recipe)
    return math.lcm(slices, segment_alignment(model))


def segment_alignment(model: Any) -> int:
    """What the segments of a packed row must be multiples of: context parallelism cuts each by itself."""
    context = model.context_parallel_size
    return 2 * context if context > 1 else 1


def experts_span_replicas(model: Any) -> bool:
    """Whether the ranks that exchange tokens in an expert layer belong to several data-parallel replicas.

    Megatron numbers both the TP·CP ranks of a replica's stage and the ETP·EP ranks that share experts consecutively.
    """
    tensor = model.tensor_model_parallel_size
    expert_tensor = getattr(model, "expert_tensor_parallel_size", None) or tensor
    sharing = expert_tensor * getattr(model, "expert_model_parallel_size", 1)
    return tensor * model.context_parallel_size % sharing > 0


def gathers_over_replicas(model: Any) -> bool:
    """Whether ranks of several replicas exchange tokens in expert layers in a way that takes equally many of each.

    Allgather does, and HybridEP where Megatron does not fill up what is uneven.
    """
    if not model.num_moe_experts:
        return False
    kind, backend = model.moe_token_dispatcher_type, getattr(model, "moe_flex_dispatcher_backend", None)
    is_even = kind == "flex" and backend == "hybridep"
    is_even = is_even and not getattr(model, "moe_hybridep_pad_uneven_dispatch_inputs", False)
    return (kind == "allgather" or is_even) and experts_span_replicas(model)
