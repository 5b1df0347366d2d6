"""Worker of test_pre_wrap: ``attach`` as a pre-wrap hook of Megatron-LM's model builder (training/models, since 0.18).

torchrun --nproc-per-node 2 tests/multiprocess/run_pre_wrap.py
"""

from __future__ import annotations

import torch

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from regate_megatron import ReGateConfig, attach, wrap_forward_backward
from regate_megatron.api import session_of
from tests.multiprocess.models import HIDDEN, TEXT, VOCAB, Step, fill_by_name, run

CASE = {"model": "gpt", "tp": 1, "pp": 2}
SETTINGS = ReGateConfig(score="regate", teacher_load="student", warmup_steps=1, cycle_steps=100, dense_steps=0)
DDP = DistributedDataParallelConfig(use_distributed_optimizer=False)


def build(hooks: list) -> list:
    """One stage of two per rank, in bf16, wrapped by the framework."""
    transformer = TransformerConfig(
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        transformer_impl="local",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    config = GPTModelConfig(transformer=transformer, vocab_size=VOCAB, seq_length=TEXT, position_embedding_type="rope")
    config.pre_wrap_hooks.extend(hooks)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(config).build_distributed_models(groups, DDP)


def train(models: list) -> list[torch.Tensor]:
    """A dense and a sparse step; the per-token losses of this rank."""
    schedule, step = wrap_forward_backward(get_forward_backward_func()), Step()
    for _ in range(2):
        run(CASE, models, schedule, step)
    return step.losses


def main() -> None:
    torch.distributed.init_process_group()
    mpu.initialize_model_parallel(pipeline_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    seen = []

    def hook(chunks: list) -> list:
        seen.extend(chunks)
        result = attach(chunks, SETTINGS)
        assert result is chunks  # list of chunks in, the same list out
        return result

    hooked = build([hook])
    assert [type(chunk) for chunk in seen] == [GPTModel]  # not wrapped yet
    assert all(type(model) is DistributedDataParallel for model in hooked)  # and wrapped after it
    session = session_of(hooked)
    assert session is not None and session.reference is None  # the teacher waits for weights
    for chunk in seen:
        fill_by_name(chunk)  # "loading a checkpoint"
    losses = train(hooked)
    assert session.work.positions_run < session.work.positions_dense
    student, teacher = dict(seen[0].named_parameters()), session.reference.run.chunks[0]
    assert all(torch.equal(value, student[name]) for name, value in teacher.named_parameters())

    later = build([])
    for model in later:
        fill_by_name(model.module.module)
    attach(later, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(losses, train(later), strict=True))
    print(f"holds on rank {torch.distributed.get_rank()}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
