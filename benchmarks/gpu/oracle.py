"""Sparse steps against the masked full-length step, on one rank; see :mod:`.parity`.

The oracle shares no code with the hooks: the plain model at full length, where the core attention of every elided layer
is replaced by a plain softmax over the kept keys, and the loss is taken at active targets only. What inactive positions
compute there is read by nobody.

Shapes: S positions, B rows, N heads, G key-value groups, D per head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from benchmarks.gpu import models, pictures
from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.compat import language_model_of

# Largest errors in fp32, scaled as loss_error and gradient_error say; or so many times the noise, if that is more.
BOUNDS = {"losses": 1e-6, "gradients": 1e-5, "noise": 3.0}
MICROBATCHES = 2


@dataclass(frozen=True)
class Case:
    """A model and how ReGATE runs it."""

    name: str
    model: str = "gpt"
    layers: str = "local"
    dense_layers: int = 1
    half: bool = False
    recompute: bool = False
    budget: str = "uniform"
    tied: bool = True
    experts: int | None = None
    visual: str = "drop"
    rows: int = 4
    fused_rope: bool = False
    graphs: str = "none"


def size_and_length(device: torch.device) -> tuple[models.Size, int]:
    """What fills a GPU a little, and what a CPU does in a second."""
    return (models.SIZES["small"], 512) if device.type == "cuda" else (models.SIZES["tiny"], 32)


def build(case: Case, device: torch.device) -> Any:
    """The case's model; weights larger than usual, so that attention matters."""
    size, length = size_and_length(device)
    options: dict[str, Any] = {"init_method_std": 0.08, "apply_rope_fusion": case.fused_rope}
    options["cuda_graph_impl"] = case.graphs
    if case.recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if case.experts:
        options |= {"num_moe_experts": case.experts, "moe_router_load_balancing_type": "none"}
    options["use_cpu_initialization"] = device.type != "cuda"
    dtype = torch.bfloat16 if case.half else torch.float32
    config = models.transformer_config(size, dtype=dtype, fused=False, calculate_per_token_loss=True, **options)
    if case.model == "llava":
        return pictures.llava(size, case.layers, length, device, config)
    return models.gpt(size, case.layers, length, device, config, share_embeddings_and_output_weights=case.tied)


def batches(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    """Rows without targets, all targets, one target, and padding, as far as there are rows."""
    size, length = size_and_length(device)
    generator = torch.Generator().manual_seed(7)
    rows = MICROBATCHES * case.rows
    token_BS = torch.randint(1, size.vocab, (rows, length + 1), generator=generator)
    mask_BS = (torch.rand(rows, length, generator=generator) < 0.6).float()
    if rows >= 8:
        mask_BS[1], mask_BS[2], mask_BS[3] = 0, 1, 0
        mask_BS[3, length // 4] = 1
        for row, end in ((1, length // 3), (3, length // 2), (4, 2 * length // 3)):
            token_BS[row, end:], mask_BS[row, end - 1 :] = 0, 0
    own = []
    for part in torch.arange(rows).split(case.rows):
        batch = {"tokens": token_BS[part, :-1], "labels": token_BS[part, 1:], "loss_mask": mask_BS[part]}
        batch["position_ids"] = torch.arange(length).expand(case.rows, -1)
        if case.model == "llava":
            pictures.add_picture(batch, generator, torch.bfloat16 if case.half else torch.float32)
        own.append({name: value.contiguous().to(device) for name, value in batch.items()})
    return own


class Losses:
    """Megatron's forward step; keeps per-token losses and the mask they were summed with.

    Args:
        masks: loss masks in place of the batches' own, one per microbatch.
    """

    def __init__(self, masks: list[Tensor] | None = None) -> None:
        self.losses: list[Tensor] = []
        self.masks: list[Tensor] = []
        self._forced = masks

    def __call__(self, iterator: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output_BS, mask_BS = pictures.run_model(model, batch)
        if self._forced:
            mask_BS = self._forced[len(self.masks)]
        self.masks.append(mask_BS)

        def loss_func(loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            self.losses.append(loss_BS.detach().float().clone())
            total, count = (loss_BS.float() * mask_BS).sum(), mask_BS.sum().int()
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output_BS, loss_func


def run(model: Any, schedule: Any, case: Case, device: torch.device, step: Losses) -> dict[str, Tensor]:
    """One forward and backward; returns gradients by name."""
    model.zero_grad(set_to_none=True)
    length = pictures.merged_length(case.model, size_and_length(device)[1])
    models.forward_backward(schedule, step, model, batches(case, device), rows=case.rows, length=length)
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def explicit_attention(model: Any, allowed: Callable[[], list[Tensor]], first_layer: int) -> Iterator[None]:
    """Replace the core attention of all layers from ``first_layer`` (from 0) by a plain softmax.

    Args:
        allowed: called at each use; which keys each query may read in the microbatch that runs, bool [B, S, S].
    """
    layers = language_model_of(model).decoder.layers[first_layer:]

    def attend(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *_: Any, **__: Any) -> Tensor:
        groups = query_SBND.shape[2] // key_SBGD.shape[2]
        key, value = (one.repeat_interleave(groups, dim=2).float() for one in (key_SBGD, value_SBGD))
        score_BNSS = torch.einsum("sbnd,tbnd->bnst", query_SBND.float(), key) / query_SBND.shape[-1] ** 0.5
        share_BNSS = score_BNSS.masked_fill(~allowed()[:, None], float("-inf")).softmax(dim=-1)
        context = torch.einsum("bnst,tbnd->sbnd", share_BNSS, value)
        return context.flatten(2).to(query_SBND.dtype).contiguous()

    for layer in layers:
        layer.self_attention.core_attention.forward = attend
    try:
        yield
    finally:
        for layer in layers:
            del layer.self_attention.core_attention.forward


def explicit_step(
    model: Any, case: Case, device: torch.device, kept: list[Tensor], first_layer: int, masks: list[Tensor]
) -> tuple[Losses, dict[str, Tensor]]:
    """A plain step with explicit attention over the kept keys of each microbatch, bool [B, S]."""
    step, current = Losses(masks), {}

    def forward_step(iterator: Any, chunk: Any) -> Any:
        kept_BS = kept[len(step.masks)].to(device)
        length = kept_BS.shape[1]
        allowed_BSS = kept_BS[:, None] & torch.ones(length, length, dtype=torch.bool, device=device).tril()
        current["allowed"] = allowed_BSS | torch.eye(length, dtype=torch.bool, device=device)  # no row may be empty
        return step(iterator, chunk)

    with explicit_attention(model, lambda: current["allowed"], first_layer):
        gradients = run(model, get_forward_backward_func(), case, device, forward_step)
    return step, gradients


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """One case; the figures that :mod:`.parity` describes."""
    model = build(case, device)
    config = ReGateConfig(
        warmup_steps=1,
        cycle_steps=100,
        dense_steps=0,
        dense_layers=case.dense_layers,
        budget=case.budget,
        length_multiple=size_and_length(device)[1] // 32 if case.half else 1,
        teacher_visual=case.visual,
        teacher_load="student",
        score="regate",
    )
    names = list(model.state_dict())
    attach([model], config, pad_token=0)
    schedule = wrap_forward_backward(get_forward_backward_func())
    plain, sparse = Losses(), Losses()
    plain_gradients = run(model, schedule, case, device, plain)  # the warm-up step runs dense
    sparse_gradients = run(model, schedule, case, device, sparse)
    plan = session_of([model]).step.plan
    assert plan.is_sparse and any(one.length < one.dense_length for one in plan.microbatches), "nothing was shortened"
    detach([model])
    assert list(model.state_dict()) == names, "names of states changed"
    kept = [one.kept_mask() for one in plan.microbatches]
    language_model_of(model).config.recompute_granularity = None  # replaced attention would be gone when layers rerun
    everything = [torch.ones_like(one) for one in kept]
    dense, dense_gradients = explicit_step(model, case, device, everything, 0, plain.masks)
    masked, gradients = explicit_step(model, case, device, kept, case.dense_layers, sparse.masks)
    for loss_BS, mask_BS, kept_BS in zip(sparse.losses, sparse.masks, kept, strict=True):
        assert not bool(loss_BS[~kept_BS.to(device)].any()), "an elided position has a loss"
        assert not bool(mask_BS[~kept_BS.to(device)].any()), "an elided target kept its loss"
    error = {"losses": loss_error(sparse, masked), "gradients": gradient_error(sparse_gradients, gradients)}
    noise = {"losses": loss_error(plain, dense), "gradients": gradient_error(plain_gradients, dense_gradients)}
    plain.masks = sparse.masks
    unhidden = loss_error(plain, sparse)
    by = "rms" if case.half else "max"
    bounds = {
        what: max(0.0 if case.half else BOUNDS[what], BOUNDS["noise"] * noise[what][by])
        for what in ("losses", "gradients")
    }
    holds = all(error[what][by] <= bound for what, bound in bounds.items()) and unhidden[by] > bounds["losses"]
    lengths = sorted({one.length for one in plan.microbatches})
    return {
        "holds": holds,
        "judged_by": by,
        "error": error,
        "noise": noise,
        "unhidden": unhidden,
        "bounds": bounds,
        "kept_lengths": lengths,
        "dense_length": plan.microbatches[0].dense_length,
    }


def loss_error(ours: Losses, others: Losses) -> dict[str, float]:
    """|a − b| ÷ (1 + |b|) over the targets of ``ours``: the largest, and the root of the mean square."""
    pairs = zip(ours.losses, others.losses, ours.masks, strict=True)
    return _summary(torch.cat([((a - b).abs() / (1 + b.abs()))[mask > 0] for a, b, mask in pairs]))


def gradient_error(ours: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    """|a − b| over the largest |b| of the tensor, or 1 if that is more: over all gradients."""
    assert ours.keys() == others.keys()
    return _summary(
        torch.cat([((ours[n] - b).abs() / b.abs().max().clamp_min(1)).flatten() for n, b in others.items()])
    )


def _summary(error_X: Tensor) -> dict[str, float]:
    return {"max": float(error_X.max()), "rms": float(error_X.double().square().mean().sqrt())}
