"""Part parity: a sparse step is the masked full-length step, and keep ratio 1.0 is plain Megatron, on CUDA and NCCL.

**Sparse steps** (:mod:`.oracle`) of a GPT, a mixture of experts and a LLaVA in fp32, and of Transformer Engine's and
flash layers in bf16, against the plain model at full length whose elided layers have an explicit attention that hides
inactive keys. Beside each error stand two others, measured with the same model and batch: ``noise``, how far that
explicit attention alone moves dense losses and gradients, and ``unhidden``, how far the sparse step is from the plain
dense one. What holds: the error is within the contract of docs/architecture.md or three times the noise, and
``unhidden`` is above that bound, so that the comparison can fail. fp32 is judged by the largest error, bf16 by the root
of the mean square.

**Keep ratio 1.0** (:mod:`.bitwise`): losses, gradient norms and weights of thirty optimizer steps, bit for bit, with
Megatron's DDP and distributed optimizer over NCCL; and plain Megatron twice, as the control.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu import bitwise, machine, oracle
from benchmarks.gpu.oracle import Case
from benchmarks.gpu.results import Results

EXACT = [
    *(Case(f"gpt-n{n}", dense_layers=n) for n in (0, 1, 2)),
    Case("gpt-n1-recompute", recompute=True),
    Case("gpt-n1-per-sample", budget="per-sample"),
    Case("gpt-n1-balanced", budget="balanced"),
    Case("gpt-n1-untied", tied=False),
    Case("moe-n1", experts=4),
    Case("llava-n1", model="llava"),
    Case("llava-n0-pad", model="llava", dense_layers=0, visual="pad"),
]
HALF = [
    *(Case(f"gpt-te-n{n}-bf16", layers="te", dense_layers=n, half=True) for n in (0, 1)),
    Case("gpt-te-n1-bf16-recompute", layers="te", half=True, recompute=True),
    Case("gpt-te-n1-bf16-fused-rope", layers="te", half=True, rows=1, fused_rope=True),
    Case("llava-te-n1-bf16", model="llava", layers="te", half=True),
    *(Case(f"gpt-flash-n{n}-bf16", layers="flash", dense_layers=n, half=True) for n in (0, 1)),
]
SAME = [
    Case("gpt-fp32"),
    Case("llava-fp32", model="llava"),
    Case("gpt-flash-bf16", layers="flash", half=True),
    Case("gpt-te-bf16", layers="te", half=True),
]


def run(options: Any, device: torch.device) -> int:
    """The part; returns the exit code."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = Results(options, tf32=False, deterministic_algorithms=True, bounds=oracle.BOUNDS)
    has_te, reason = machine.check_transformer_engine()
    needs = 5 if options.cpu_rehearsal else 20
    for kind, cases, check in (("sparse", EXACT + HALF, oracle.check), ("keep1", SAME, bitwise.check)):
        for case in cases:
            name = f"{kind}-{case.name}"
            if case.layers == "te" and not has_te:
                results.skip(name, reason)
            else:
                results.measure(name, needs, functools.partial(check, case, device))
    return results.finish()
