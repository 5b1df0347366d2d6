"""Part graphs: CUDA graphs replayed in dense steps, beside sparse steps without.

Six optimizer steps from the same weights on the same batches, sparse and dense in turn and the first one sparse,
without graphs and with: Megatron's own (``local``) in fp32, Transformer Engine's in bf16. Kept positions are the same
(score random). What holds: losses are those without graphs, within 1e-5 in fp32 and 1 % in bf16 of 1 + the loss; dense
steps replay graphs from the second on, and sparse steps replay none. ``again`` is how far two runs without graphs are
apart.

In a rehearsal there are no graphs: both runs are without, and nothing may be replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import num_microbatches_calculator, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import cuda_graphs
from torch import Tensor

from benchmarks.gpu import machine, models
from benchmarks.gpu.bitwise import under_ddp
from benchmarks.gpu.oracle import MICROBATCHES, Case, Losses, batches, size_and_length
from benchmarks.gpu.results import Results
from regate_megatron import ReGateConfig, attach, detach, wrap_forward_backward
from regate_megatron.api import session_of

PHASES, FIRST_REPLAY = "sdsdsd", 3
TE_CAPTURE = 2  # the step before which Transformer Engine's graphs are made
CASES = (Case("local", graphs="local"), Case("transformer_engine", layers="te", half=True, graphs="transformer_engine"))
TOLERANCE = {False: 1e-5, True: 1e-2}  # by whether it is bf16


def run(options: Any, device: torch.device) -> int:
    """The part; returns the exit code."""
    results = Results(options, phases=PHASES, tolerance={"fp32": TOLERANCE[False], "bf16": TOLERANCE[True]})
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tensor_parallel.model_parallel_cuda_manual_seed(
        1234, use_cudagraphable_rng=device.type == "cuda", force_reset_rng=True
    )
    has_te, reason = machine.check_transformer_engine()
    for case in (Case("none"),) if options.cpu_rehearsal else CASES:
        if case.layers == "te" and not has_te:
            results.skip(case.name, reason)
        else:
            results.measure(case.name, 5 if options.cpu_rehearsal else 40, functools.partial(check, case, device))
    return results.finish()


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """One kind of graphs against none."""
    without = Case(case.name, layers=case.layers, half=case.half)
    plain, none = train(without, device)
    again, _ = train(without, device)
    graphed, replays = train(case, device)
    error, noise = apart(plain, graphed), apart(plain, again)
    replayed = [count > 0 for count in replays]
    wanted = [case.graphs != "none" and phase == "d" and n >= FIRST_REPLAY for n, phase in enumerate(PHASES)]
    bound = max(TOLERANCE[case.half], 3 * max(noise))
    return {
        "holds": max(error) <= bound and replayed == wanted and not any(none),
        "error": max(error),
        "bound": bound,
        "error_by_step": error,
        "again": max(noise),
        "replays": replays,
        "losses": [round(float(losses.mean()), 6) for losses in graphed],
    }


def train(case: Case, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Per step the loss at every position, [MICROBATCHES · B · S], and how many graphs were replayed."""
    model, optimizer = under_ddp(case, device, overlap_param_gather=False)
    phases = {"warmup_steps": 0, "dense_steps": 0, "cycle_steps": 100}
    attach([model], ReGateConfig(score="random", keep_ratio=0.5, **phases), pad_token=0)
    session, schedule = session_of([model]), wrap_forward_backward(get_forward_backward_func())
    length, history, replays = size_and_length(device)[1], [], []
    for number, phase in enumerate(PHASES):
        if case.graphs == "transformer_engine" and number == TE_CAPTURE:
            capture(case, model, optimizer, length)
        session.restore(number, number + (phase == "d"), session.totals)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        step = Losses()
        with counted_replays() as count:
            models.forward_backward(schedule, step, model, batches(case, device), rows=case.rows, length=length)
        assert session.step.plan.is_sparse == (phase == "s"), "another phase than was asked for"
        optimizer.step()
        history.append(torch.cat([losses.flatten() for losses in step.losses]))
        replays.append(sum(count))
    detach([model])
    if case.graphs == "local":
        cuda_graphs.delete_cuda_graphs()
    return history, replays


def capture(case: Case, model: Any, optimizer: Any, length: int) -> None:
    """As Megatron's training loop does between two steps."""
    sizes = {"global_batch_size": MICROBATCHES * case.rows, "micro_batch_size": case.rows, "data_parallel_size": 1}
    num_microbatches_calculator.init_num_microbatches_calculator(rank=0, rampup_batch_size=None, **sizes)
    cuda_graphs.TECudaGraphHelper([model], model.config, length, case.rows, [optimizer]).create_cudagraphs()


@contextmanager
def counted_replays() -> Iterator[list[int]]:
    """Gets a 1 for every graph that is replayed, forward or backward."""
    count: list[int] = []
    real = torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> None:
        count.append(1)
        real(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", replay):
        yield count


def apart(one: list[Tensor], two: list[Tensor]) -> list[float]:
    """Per step the largest |a − b| ÷ (1 + |b|)."""
    return [float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(one, two, strict=True)]
