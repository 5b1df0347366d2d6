"""Worker of the tests of Megatron-Bridge's official recipes: each as it is written, shrunk, through its ``finetune``.

    python -m tests.frameworks.run_recipes FOLDER [CASE …]

What is shrunk is in :func:`shrink`: sizes (a tiny Hugging Face folder), data (pictures of noise), precision and kernels
(a CPU's), steps and folders. All else is the recipe's: packing, micro-batch size, optimizer, adapters, forward step.
Each case leaves FOLDER/CASE.json, its log, and its trace.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.frameworks import bridge_on_cpu

bridge_on_cpu.install()

from megatron.bridge.data.builders import HFDatasetSourceConfig
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.models.qwen_vl import qwen3_vl_step
from megatron.bridge.peft import utils as peft_utils
from megatron.bridge.recipes.qwen_vl.h100 import qwen3_vl, qwen25_vl
from megatron.bridge.training import vlm_step
from megatron.bridge.training.config import ConfigContainer, RerunStateMachineConfig
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.pretrain import pretrain

from regate_megatron import ReGateConfig
from regate_megatron.integrations import megatron_bridge
from tests.frameworks import bridge_models, tiny_hf
from tests.frameworks.forked import run
from tests.frameworks.run_bridge import Record

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe of Bridge's, and how it is trained.

    Attributes:
        family: whose tiny folder stands in the place of the one that the recipe downloads.
        make: the recipe.
        step: the forward step that Bridge's documentation names for it.
        regate: settings; None for plain Bridge.
        begins: whether it makes the checkpoint that the others of its family begin with.
        tp: ranks of tensor parallelism.
    """

    family: str
    make: Callable[[], ConfigContainer]
    step: Any
    regate: dict[str, Any] | None = None
    begins: bool = False
    tp: int = 1


_QWEN25 = ("qwen2_5_vl", qwen25_vl.qwen25_vl_3b_sft_1gpu_h100_bf16_config, vlm_step)
_QWEN25_PEFT = ("qwen2_5_vl", qwen25_vl.qwen25_vl_3b_peft_1gpu_h100_bf16_config, vlm_step)
_QWEN3 = ("qwen3_vl", qwen3_vl.qwen3_vl_8b_sft_2gpu_h100_bf16_config, qwen3_vl_step)
_QWEN3_PEFT = ("qwen3_vl", qwen3_vl.qwen3_vl_8b_peft_1gpu_h100_bf16_config, qwen3_vl_step)
_START = {"teacher_load": "start"}
RECIPES = {}
for _name, _recipe in {
    "qwen25 sft": _QWEN25,
    "qwen25 peft": _QWEN25_PEFT,
    "qwen3 sft": _QWEN3,
    "qwen3 peft": _QWEN3_PEFT,
}.items():
    if _name.endswith("sft"):
        RECIPES[f"{_name} start"] = Recipe(*_recipe, begins=True)
    RECIPES |= {
        f"{_name} plain": Recipe(*_recipe),
        f"{_name} all kept": Recipe(*_recipe, regate={"keep_ratio": 1.0} | _START),
        f"{_name} regate": Recipe(*_recipe, regate=_START),
        f"{_name} student": Recipe(*_recipe, regate={"teacher_load": "student"}),
        f"{_name} student tp2": Recipe(*_recipe, regate={"teacher_load": "student"}, tp=2),
        f"{_name} visual": Recipe(*_recipe, regate={"visual_keep_ratio": 0.25} | _START),
    }


def shrink(config: ConfigContainer, folder: Path, family: str, name: str, tp: int) -> None:
    """What a CPU and a folder without internet cannot give."""
    model = config.model
    if family == "qwen2_5_vl":
        model.transformer_layer_spec, model.mrope_section = local_layer_spec, [1, 1, 2]
    else:
        bridge_models.without_engine()
    for kernel in ("cross_entropy_loss", "bias_activation", "masked_softmax", "bias_dropout", "gradient_accumulation"):
        setattr(model, f"{kernel}_fusion", False)
    model.apply_rope_fusion = model.persist_layer_norm = False
    peft_utils.HAVE_TE = False  # no layer is one of its
    config.tokenizer.vocab_size = model.vocab_size - 1
    model.use_cpu_initialization, model.transformer_impl = True, "local"
    model.tensor_model_parallel_size = tp
    config.mixed_precision = None
    model.bf16, model.params_dtype = False, bridge_models.torch.float32
    config.optimizer.bf16 = False
    config.train.train_iters, config.train.global_batch_size = STEPS, 4
    config.validation.eval_iters = 0
    config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_iters = 0, STEPS
    config.logger.log_interval, config.logger.tensorboard_dir = 2, str(folder / name / "tensorboard")
    config.rerun_state_machine = RerunStateMachineConfig(rerun_mode="disabled")
    config.dataset.hf_processor_path = str(folder / family)
    config.dataset.source = HFDatasetSourceConfig(
        path_or_dataset="json",
        split="train",
        load_kwargs={"data_files": str(folder / "pictures" / "rows.jsonl")},
        schema_adapter="rdr",
    )
    config.dataset.do_validation = config.dataset.do_test = False
    config.dataset.num_workers, config.dataset.pin_memory = 0, False
    config.checkpoint.save, config.checkpoint.load = str(folder / name / "checkpoints"), None
    config.checkpoint.save_interval = STEPS


def train(name: str, recipe: Recipe, folder: Path) -> None:
    """One rank of a case."""
    rooms = [sys.modules[recipe.make.__module__].AutoBridge]
    with mock.patch.object(
        rooms[0], "from_hf_pretrained", partial(_local, rooms[0].from_hf_pretrained, folder / recipe.family)
    ):
        config = recipe.make()
    shrink(config, folder, recipe.family, name, recipe.tp)
    record = Record()
    start = str(folder / f"{name.split()[0]} sft start" / "checkpoints")
    callbacks: list[Any] = [record]
    if recipe.regate is not None:
        chosen = recipe.regate | {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 1}
        chosen |= {"trace": str(folder / name / "trace")}
        if chosen["teacher_load"] == "start":
            chosen["teacher_load"] = start
        callbacks = [megatron_bridge.install(ReGateConfig(**chosen)), record]
    if recipe.begins:
        config.train.train_iters = config.checkpoint.save_interval = 1
        pretrain(config, recipe.step.forward_step, callbacks=callbacks)
    else:
        config.checkpoint.pretrained_checkpoint = start
        finetune(config, recipe.step.forward_step, callbacks=callbacks)
    found = {"losses": record.losses, "packs": config.dataset.enable_in_batch_packing, **record.seen}
    found |= {"micro_batch_size": config.train.micro_batch_size, "peft": config.peft is not None}
    if os.environ["RANK"] == "0":
        (folder / f"{name}.json").write_text(json.dumps(found))


def _local(original: Callable[..., Any], folder: Path, _path: str, **options: Any) -> Any:
    return original(str(folder), **options)


def main(folder: str, *names: str) -> int:
    """Run the cases; the number of those that failed."""
    here, failed = Path(folder), 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not live through a fork
    os.environ["HF_DATASETS_CACHE"] = str(here / "datasets")
    for family in ("qwen2_5_vl", "qwen3_vl"):
        tiny_hf.write(here / family, family)
    tiny_hf.write_pictures(here / "pictures")
    for name in names or RECIPES:
        failed += not run(name, RECIPES[name].tp, here / f"{name}.log", partial(train, name, RECIPES[name], here))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
