#!/usr/bin/env python3
"""ReGATE in a training loop of your own: any loop over Megatron-Core's ``get_forward_backward_func``.

    torchrun --nproc-per-node 2 examples/own_loop.py             two GPUs, or two CPU ranks where there is no GPU
    torchrun --nproc-per-node 2 examples/own_loop.py --steps 20

The three lines a loop needs are marked (1) to (3); everything else is what such a loop has anyway. Here: a GPTModel on
two pipeline stages, DDP, Adam, and rows of which the first third is a prompt (loss mask 0). It prints a line per step.

Where Megatron-LM's model builders make the model (``megatron/training/models``, since 0.18), ``attach`` goes into the
model config's ``pre_wrap_hooks`` instead: ``config.pre_wrap_hooks.append(lambda chunks: attach(chunks, settings))``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installing

if not torch.cuda.is_available():  # no GPU: gloo ranks under the emulation; a loop on GPUs has no such line
    from regate_megatron.cpu import emulation

    emulation.set_environment()
    emulation.install()

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from regate_megatron import ReGateConfig, attach, describe, wrap_forward_backward

VOCAB, LENGTH, ROWS, MICROBATCHES = 64, 48, 2, 4


def build_model() -> list[GPTModel]:
    """This rank's stage of a small GPT, as a list of chunks (more than one with interleaved stages)."""
    transformer = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        finalize_model_grads_func=finalize_model_grads,
        calculate_per_token_loss=True,  # rows keep different numbers of targets: weigh tokens alike
    )
    model = GPTModel(
        transformer,
        get_gpt_layer_local_spec(),
        VOCAB,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return [model.cuda()]


def batches(step: int):
    """This step's microbatches: rows that count upwards, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(MICROBATCHES):
        start = torch.randint(VOCAB, (ROWS, 1), generator=generator)
        tokens = (start + torch.arange(LENGTH + 1) * torch.randint(1, 4, (ROWS, 1), generator=generator)) % VOCAB
        loss_mask = torch.ones(ROWS, LENGTH)
        loss_mask[:, : LENGTH // 3] = 0
        position_ids = torch.arange(LENGTH).expand(ROWS, -1)
        # The keys of pretrain_gpt.py's batches: ReGATE reads tokens, labels and loss_mask.
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": loss_mask,
            "position_ids": position_ids,
        }


def forward_step(iterator, model):
    """One microbatch, as every Megatron loop has it."""
    batch = {name: value.cuda() for name, value in next(iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(masked_sum, batch["loss_mask"])


def masked_sum(loss_mask, losses):
    """Sum and number over positions with loss, and a report: elided targets come with a loss mask of 0."""
    loss, targets = (losses * loss_mask).sum(), loss_mask.sum().int()
    return loss, targets, {"loss": loss.detach() / targets.clamp(min=1)}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=torch.distributed.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    trace = Path(tempfile.gettempdir(), f"regate-own-loop-{os.environ['MASTER_PORT']}")

    model = build_model()
    config = ReGateConfig(teacher_load="student", warmup_steps=2, cycle_steps=4, dense_steps=1, trace=str(trace))
    model = attach(model, config)  # (1) before or after wrapping in DDP; weights may be loaded later, before step 1
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    model = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in model]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3), model)
    forward_backward = wrap_forward_backward(get_forward_backward_func())  # (2) in place of the plain function
    for rank in range(torch.distributed.get_world_size()):
        if rank == torch.distributed.get_rank():
            print(
                f"rank {rank}: " + describe(model).replace("\n", "\n        "), flush=True
            )  # (3) what is on, optional
        torch.distributed.barrier()

    for step in range(options.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches(step),
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        optimizer.step()
        if reports:  # the last stage has the losses
            print(f"step {step + 1}: loss {sum(float(one['loss']) for one in reports) / len(reports):.4f}", flush=True)

    # A step counts once the next one begins, so the trace ends one step before the last.
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for line in (trace / "dp00000.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["microbatch"] == 0:
                shown = ("iteration", "phase", "dense_length", "kept_length")
                print("trace: " + ", ".join(f"{name} {record[name]}" for name in shown))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
