"""A sparse step of a model against its oracle: the same model at full length, in which nobody reads what was left out.

The oracle knows nothing of ranges of layers or gathering: elided positions run through every layer, each for itself,
and their keys are hidden from all others after the dense layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.compat import language_model_of, unwrap
from regate_megatron.decoder.cutting import places


def compare(
    model: list[Any],
    run: Callable[[Callable[..., Any], dict[str, Any]], Tensor],
    schedule: Callable[..., Any],
    batch: dict[str, Any],
    dense_layers: int,
    visual_score: str = "random",
) -> dict[str, float]:
    """Errors of loss and gradients of one microbatch, over the largest of each tensor or 1.

    Args:
        model: its one chunk, in DDP.
        run: runs a schedule over a batch; the loss.
    """
    by_chance = {"score": "random", "visual_score": visual_score, "visual_keep_ratio": 0.5}
    steps = {"warmup_steps": 0, "cycle_steps": 100, "dense_steps": 0}
    attach(model, ReGateConfig(**by_chance, **steps, dense_layers=dense_layers))
    loss, gradients = _step(model, run, wrap_forward_backward(schedule), batch)
    session = session_of(model)
    (plan,) = session.step.plan.microbatches
    masked = session.adapter.elide(batch, ~plan.kept_mask())
    detach(model)
    layers = language_model_of(unwrap(model[0])).decoder.layers[dense_layers:]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_hidden_from_others(layer.self_attention, ~plan.kept_mask()))
        oracle_loss, oracle_gradients = _step(model, run, schedule, masked)
    errors = [
        float((own - theirs).abs().max() / max(1.0, float(theirs.abs().max())))
        for own, theirs in zip(gradients, oracle_gradients, strict=True)
    ]
    return {
        "kept": int(plan.kept_mask().sum()),
        "dense": plan.kept_mask().numel(),
        "loss_error": float((loss - oracle_loss).abs() / max(1.0, float(oracle_loss))),
        "gradient_error": max(errors),
        "gradients": sum(bool(theirs.abs().max() > 0) for theirs in oracle_gradients),
    }


def _step(model: list[Any], run: Any, schedule: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    model[0].zero_grad_buffer()
    loss = run(schedule, batch).detach().clone()
    gradients = [parameter.main_grad.clone() for parameter in model[0].parameters() if parameter.requires_grad]
    if mpu.get_context_parallel_world_size() > 1:  # each rank has a part, and which one depends on the length
        for value in (loss, *gradients):
            dist.all_reduce(value, group=mpu.get_context_parallel_group())
    return loss, gradients


def _hidden_from_others(attention: Any, is_hidden_BS: Tensor) -> Any:
    """Attention in which hidden keys are seen by themselves alone."""
    size, length = mpu.get_context_parallel_world_size(), is_hidden_BS.shape[1]
    if size == 1 and hasattr(attention, "_local_causal_attention"):  # Qwen3-VL of Bridge: no mask reaches it
        return mock.patch.object(attention, "_local_causal_attention", _hiding(is_hidden_BS))
    core = attention.core_attention
    inner = core.forward
    own_q = places([length], cp_size=size).positions_of(mpu.get_context_parallel_rank())
    is_hidden_BqS = (is_hidden_BS[:, None, :] & ~torch.eye(length, dtype=torch.bool))[:, own_q]

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **options: Any) -> Tensor:
        if mask is None:  # of causal attention, by its type
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)[own_q][None, None]
        hidden_B1qS = mask | is_hidden_BqS[:, None]
        return inner(query, key, value, hidden_B1qS, *args, **options)

    return mock.patch.object(core, "forward", forward)


def _hiding(is_hidden_BS: Tensor) -> Callable[..., Tensor]:
    """Causal attention in which hidden keys are seen by themselves alone; in place of the model's own."""

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key, value = (each.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for each in (key, value))
        length = len(query)
        hidden_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden_BSS = (hidden_SS | is_hidden_BS[:, None, :]) & ~torch.eye(length, dtype=torch.bool)
        scores = torch.einsum("sbhd,tbhd->bhst", query, key).float() * scale
        shares = scores.masked_fill(hidden_BSS[:, None], -torch.inf).softmax(dim=-1).to(value.dtype)
        return torch.einsum("bhst,tbhd->sbhd", shares, value).flatten(2)

    return attention
