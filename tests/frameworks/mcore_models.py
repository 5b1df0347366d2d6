"""Models of mcore-bridge in every layout, with the same weights, with and without adapters."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from peft import LoraConfig, get_peft_model

from tests.frameworks import mcore_on_cpu


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the groups of ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def multiple(self) -> int:
        """What each sample is filled up to: context ranks cut it."""
        return 2 * self.cp if self.cp > 1 else 1

    def initialize(self) -> None:
        """Make the groups of this process."""
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=1,
            context_parallel_size=self.cp,
        )

    def settings(self) -> dict[str, Any]:
        """What a model's configuration says of it."""
        sizes = {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp}
        sizes |= {"context_parallel_size": self.cp}
        if self.pp > 1:  # deepstack has to end in the first stage
            sizes |= {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
        return sizes | {"expert_model_parallel_size": self.ep, "sequence_parallel": self.tp > 1}


def build(
    folder: Path, layout: Layout, kind: str | None = None, *, adapts: bool = False, whole: Any = None
) -> list[Any]:
    """The model of a folder, the same weights every time, or its part of those of the whole."""
    chunk = bare(folder, layout, kind)
    if whole is not None:
        take_weights(chunk, whole)
    if adapts:
        adapt(chunk, layout)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    return [DistributedDataParallel(chunk.config, ddp, chunk)]


def bare(folder: Path, layout: Layout, kind: str | None) -> Any:
    """The model as mcore-bridge makes it."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    (chunk,) = mcore_on_cpu.model(folder, calculate_per_token_loss=True, mcore_model_type=kind, **layout.settings())
    return chunk


def adapt(chunk: Any, layout: Layout) -> None:
    """Put adapters on the language model, as ms-swift does with ``--tuner_type lora``; the same in every layout.

    On routers, too (``all-router``).
    """
    layers = r"language_model\.decoder\..*\.(linear_\w+|router)"
    get_peft_model(chunk, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=layers))
    for layer in chunk.modules():
        if getattr(layer, "explicit_expert_comm", False):  # without bias; of experts that are shared Megatron asks it
            layer.skip_bias_add = True
    in_whole, rank = _names_in_whole(chunk), parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        if ".lora_A." in name:
            parts = layout.tp if getattr(parameter, "partition_dim", -1) == 1 else 1
            generator = torch.Generator().manual_seed(zlib.crc32(in_whole(name).encode()))
            whole = torch.randn(len(parameter), parts * parameter.shape[1], generator=generator) / 8
            parameter.data.copy_(whole.chunk(parts, dim=1)[rank if parts > 1 else 0])


def take_weights(model: Any, whole: dict[str, torch.Tensor]) -> None:
    """Give a part of a model (a stage, some of the experts) its part of the weights of the whole."""
    own, in_whole = model.state_dict(), _names_in_whole(model)
    model.load_state_dict({name: whole[in_whole(name)] for name in own if not name.endswith("_extra_state")}, False)


def _names_in_whole(model: Any) -> Callable[[str], str]:
    """What tensors of a part of a model are called in the whole."""
    layers = model.language_model.decoder.layers
    first = layers[0].layer_number - 1
    experts = [getattr(getattr(layer.mlp, "experts", None), "num_local_experts", 0) for layer in layers]
    expert = max(experts) * parallel_state.get_expert_model_parallel_rank()

    def in_whole(name: str) -> str:
        name = re.sub(r"(decoder\.layers\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) + first}", name)
        return re.sub(r"(local_experts\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) + expert}", name)

    return in_whole
