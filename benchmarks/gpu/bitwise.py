"""Keep ratio 1.0 against plain Megatron, bit for bit, with its DDP and distributed optimizer; see :mod:`.parity`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from benchmarks.gpu import models, pictures
from benchmarks.gpu.oracle import Case, Losses, batches, build, size_and_length
from regate_megatron import ReGateConfig, attach, wrap_forward_backward

STEPS = {"cuda": 30, "cpu": 4}


def under_ddp(case: Case, device: torch.device, *, overlap_param_gather: bool = True) -> tuple[Any, Any]:
    """The case's model under Megatron's DDP, and its distributed optimizer."""
    model = build(case, device)
    sync = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    sync |= {"overlap_param_gather": overlap_param_gather}
    settings = DistributedDataParallelConfig(**sync, grad_reduce_in_fp32=True, bucket_size=100_000)
    model = DistributedDataParallel(model.config, settings, model)
    precision = {"bf16": case.half, "params_dtype": model.config.params_dtype}
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap_param_gather,
        **precision,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    transformer = model.config
    transformer.no_sync_func, transformer.grad_sync_func = model.no_sync, model.start_grad_sync
    transformer.param_sync_func = model.start_param_sync if overlap_param_gather else None
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def train(case: Case, device: torch.device, *, with_regate: bool) -> tuple[list[Any], list[Tensor]]:
    """Losses and gradient norms of every step, and the weights at the end."""
    model, optimizer = under_ddp(case, device)
    schedule = get_forward_backward_func()
    if with_regate:
        phases = {"warmup_steps": 2, "cycle_steps": 4, "dense_steps": 1}
        attach([model], ReGateConfig(keep_ratio=1.0, score="regate", teacher_load="student", **phases), pad_token=0)
        schedule = wrap_forward_backward(schedule)
    length, history = pictures.merged_length(case.model, size_and_length(device)[1]), []
    for _ in range(STEPS[device.type]):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        step, own = Losses(), batches(case, device)
        models.forward_backward(schedule, step, model, own, rows=case.rows, length=length)
        _, norm, _ = optimizer.step()
        history.append((step.losses, float(norm)))
    return history, [parameter.detach().clone() for parameter in model.parameters()]


def differences(one: tuple[list[Any], list[Tensor]], two: tuple[list[Any], list[Tensor]]) -> dict[str, int | None]:
    """The first step whose losses or gradient norm differ, and how many weight tensors do."""
    steps = zip(one[0], two[0], strict=True)
    differs = [norm != other or not all(map(torch.equal, a, b)) for (a, norm), (b, other) in steps]
    weights = sum(not torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
    return {"first_step": differs.index(True) if any(differs) else None, "weights": weights}


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """One case: ours against plain, and plain against plain, which says what the machine itself repeats."""
    plain, ours = train(case, device, with_regate=False), train(case, device, with_regate=True)
    control = differences(plain, train(case, device, with_regate=False))
    found = differences(plain, ours)
    norms = [norm for _, norm in plain[0]]
    assert len(set(norms)) > len(norms) // 2, "nothing was trained"
    repeats = control == {"first_step": None, "weights": 0}
    return {
        "holds": found == {"first_step": None, "weights": 0} if repeats else None,
        "differs": found,
        "control": control,
        "steps": len(norms),
        "first_losses": [round(float(loss.mean()), 6) for loss in plain[0][0][0]],
        "last_losses": [round(float(loss.mean()), 6) for loss in plain[0][-1][0]],
    }
