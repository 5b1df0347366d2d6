"""What the parity worker needs of Megatron-Core and finds under other names in other versions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core import utils

try:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
except ImportError:  # before core 0.18
    from megatron.core.transformer.moe import moe_utils

    get_moe_metrics_tracker = None


def router_metrics() -> dict[str, torch.Tensor]:
    """What routers have logged since it was forgotten: auxiliary losses per layer."""
    if get_moe_metrics_tracker is None:
        return {name: one["values"].clone() for name, one in moe_utils.get_moe_layer_wise_logging_tracker().items()}
    return {name: one.values.clone() for name, one in get_moe_metrics_tracker().metrics.items()}


def forget_router_metrics() -> None:
    """As Megatron's training loop does after each step."""
    if get_moe_metrics_tracker is None:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        get_moe_metrics_tracker().metrics.clear()


def own_part(batch: dict[str, Any]) -> dict[str, Any]:
    """This context rank's part of a batch; the position ids of mrope stay whole, as the model cuts its table itself."""
    takes = inspect.signature(utils.get_batch_on_this_cp_rank).parameters
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in takes else {}
    whole = {"position_ids": batch["position_ids"]} if batch["position_ids"].dim() == 3 else {}
    given = {name: value for name, value in batch.items() if name not in whole}
    return utils.get_batch_on_this_cp_rank(given, cp_group=mpu.get_context_parallel_group(), **hybrid) | whole


def flat_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """Packed rows as one; only versions that pack rows in their own scripts have it."""
    return utils.flatten_batch_for_packed_sequences(batch)
