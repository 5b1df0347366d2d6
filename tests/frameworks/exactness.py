"""A sparse step of a model against its oracle: the same model at full length, in which nobody reads what was left out.

The oracle knows nothing of ranges of layers or gathering: elided positions run through every layer, each for itself,
and their keys are hidden from all others after the dense layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.compat import language_model_of, unwrap


def compare(
    model: list[Any],
    run: Callable[[Callable[..., Any], dict[str, Any]], Tensor],
    schedule: Callable[..., Any],
    batch: dict[str, Any],
    dense_layers: int,
) -> dict[str, float]:
    """Errors of loss and gradients of one microbatch, over the largest of each tensor or 1.

    Args:
        model: its one chunk, in DDP.
        run: runs a schedule over a batch; the loss.
    """
    by_chance = {"score": "random", "visual_score": "random", "visual_keep_ratio": 0.5}
    steps = {"warmup_steps": 0, "cycle_steps": 100, "dense_steps": 0}
    attach(model, ReGateConfig(**by_chance, **steps, dense_layers=dense_layers))
    loss, gradients = _step(model, run, wrap_forward_backward(schedule), batch)
    (plan,) = session_of(model).step.plan.microbatches
    detach(model)
    is_kept_BS = plan.kept_mask()[:, : batch["loss_mask"].shape[1]]
    masked = dict(batch, loss_mask=batch["loss_mask"].masked_fill(~is_kept_BS, 0))
    attentions = [layer.self_attention for layer in language_model_of(unwrap(model[0])).decoder.layers[dense_layers:]]
    for attention in attentions:
        attention._local_causal_attention = _hiding(~plan.kept_mask())
    oracle_loss, oracle_gradients = _step(model, run, schedule, masked)
    for attention in attentions:
        del attention._local_causal_attention
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
    loss = run(schedule, batch)
    return loss, [parameter.main_grad.clone() for parameter in model[0].parameters()]


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
