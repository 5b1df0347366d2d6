"""Worker of test_bitwise: optimizer steps with ReGATE at keep ratio 1.0 and without it, compared bit for bit.

Megatron's own DDP and distributed optimizer, gradients reduced and weights gathered while the schedule runs.

    torchrun --nproc-per-node 4 tests/multiprocess/run_bitwise.py 20 gpt@tp2-dp2 llava@tp2-pp2
"""

from __future__ import annotations

import sys

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from regate_megatron import ReGateConfig, attach, wrap_forward_backward
from tests.multiprocess.models import Step, build, parallel, run, shared_store, under_ddp

CASES = {
    "gpt@tp2-dp2": {"model": "gpt", "tp": 2, "pp": 1},
    "gpt@pp2-vpp2-dp2": {"model": "gpt", "tp": 1, "pp": 2, "vpp": 2},
    "gpt@cp2-tp2-sp": {"model": "gpt", "tp": 2, "pp": 1, "cp": 2, "sp": True},
    "llava@tp2-pp2": {"model": "llava", "tp": 2, "pp": 2},
    "llava@dp4": {"model": "llava", "tp": 1, "pp": 1},
    "gpt-ahead@tp2-pp2": {"model": "gpt", "tp": 2, "pp": 2, "config": {"mtp_num_layers": 2}},
    "llava-sized@tp4": {"model": "llava", "tp": 4, "pp": 1, "longest": 56, "dynamic": {}},
    "mimo@tp2-dp2": {"model": "mimo", "tp": 2, "pp": 1, "sp": True},
}


def train(case: dict, steps: int, *, with_regate: bool) -> tuple[list, list[torch.Tensor]]:
    """Losses and gradient norms of every step, and the weights at the end."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    models = build(case)
    models, optimizer = under_ddp(models, optimizer="adam", lr=1e-3, overlap_param_gather=True)
    schedule = get_forward_backward_func()
    if with_regate:
        config = ReGateConfig(
            keep_ratio=1.0,
            visual_keep_ratio=1.0,
            visual_score="static",
            warmup_steps=2,
            cycle_steps=4,
            dense_steps=1,
            teacher_load="student",
            score="regate",
        )
        attach(models, config, pad_token=0)
        schedule = wrap_forward_backward(schedule)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        step = Step()
        run(case, models, schedule, step)
        _, norm, _ = optimizer.step()
        history.append(([loss_BS.clone() for loss_BS in step.losses], float(norm)))
    return history, [parameter.detach().clone() for model in models for parameter in model.parameters()]


def main(steps: int, names: list[str]) -> None:
    store = shared_store()
    for name in names:
        case = dict(CASES[name], name=name, dense_layers=1)
        with parallel(case, store):
            compare(case, steps)
            if dist.get_rank() == 0:
                print(f"equal over {steps} steps: {name}", flush=True)


def compare(case: dict, steps: int) -> None:
    """Train with and without; raises AssertionError at the first difference."""
    plain, plain_weights = train(case, steps, with_regate=False)
    ours, our_weights = train(case, steps, with_regate=True)
    assert len({norm for _, norm in plain}) > steps // 2, "nothing was trained"
    for number, ((losses, norm), (our_losses, our_norm)) in enumerate(zip(plain, ours, strict=True)):
        assert norm == our_norm, f"{case['name']}: gradient norm of step {number}"
        assert all(map(torch.equal, losses, our_losses)), f"{case['name']}: losses of step {number}"
    assert all(map(torch.equal, plain_weights, our_weights)), f"{case['name']}: weights"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
