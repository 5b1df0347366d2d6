"""Worker of the tests of ms-swift: its command line ``megatron sft``, on tiny folders and a few pictures.

    python -m tests.frameworks.run_swift FOLDER [CASE …]

Each case is the line of ms-swift's examples/megatron/multimodal/dense (``full.sh`` and ``lora.sh``, on one rank, with
the optimizer saved), with what a CPU needs (``CPU``) and what a small training needs (``SMALL``), and a plugin as
docs/ms_swift.md shows it. The launcher is left out: a rank runs the module that it would start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
import typing
from functools import partial
from pathlib import Path
from typing import Any

from tests.frameworks import mcore_on_cpu

mcore_on_cpu.install()

import torch

torch.jit.script = lambda function, *_, **__: function  # it cannot compile what the emulation has replaced

from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from swift.megatron.arguments import MegatronArguments
from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map
from swift.megatron.pipelines.train import sft
from swift.megatron.trainers import base
from swift.megatron.utils import utils
from swift.template.templates import qwen
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from regate_megatron.api import session_of
from tests.frameworks import tiny_hf
from tests.frameworks.forked import run
from tests.frameworks.run_mcore import ALL_KEPT, VISUAL

# Folders have the names of published ones, by which ms-swift knows its templates.
FAMILIES = {"qwen25": ("qwen2_5_vl", "Qwen2.5-VL-7B-Instruct"), "qwen3": ("qwen3_vl", "Qwen3-VL-8B-Instruct")}
EXAMPLE = """--save_safetensors true --load_from_cache_file true --tensor_model_parallel_size 1 --sequence_parallel true
    --packing true --freeze_llm false --freeze_vit true --freeze_aligner true --micro_batch_size 1 --global_batch_size 4
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --finetune true
    --cross_entropy_loss_fusion true --lr_warmup_fraction 0.05 --min_lr 1e-6"""
LORA = "--tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear --merge_lora false"
CPU = """--torch_dtype float32 --fp16 false --bf16 false --use_cpu_initialization true --check_model false
    --gradient_accumulation_fusion false --masked_softmax_fusion false --bias_dropout_fusion false
    --bias_activation_fusion false --vit_attn_impl eager --megatron_extra_kwargs {"persist_layer_norm":false}"""
# Two rows to a pack, in the order of the file, as padded microbatches of two rows have them.
SMALL = """--lr 1e-2 --lr_warmup_fraction 0 --train_iters 4 --max_length 256 --packing_strategy sequential
    --train_dataloader_shuffle false --split_dataset_ratio 0 --save_steps 2 --logging_steps 1 --add_version false
    --dataloader_num_workers 0 --dataset_num_proc 1 --dataloader_multiprocessing_context fork"""
PADDED = "--packing false --padding_free false --micro_batch_size 2 --global_batch_size 8"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        regate: settings; None for plain ms-swift.
        flags: beside the example's.
        goes_on: the case whose first two steps it continues, and the flag that names its checkpoint.
        is_refused: whether it ends with a refusal.
        num_ranks: how many there are.
    """

    regate: dict[str, Any] | None = None
    flags: str = ""
    goes_on: tuple[str, str] | None = None
    is_refused: bool = False
    num_ranks: int = 1


FIRST = "{folder}/qwen25 full visual/checkpoint-2/regate/teacher"
SHOWN = {"keep_ratio": 0.5, "teacher_load": "student"}  # in docs/ms_swift.md
CASES = {}
for _family in FAMILIES:
    for _tuner, _flags in {"full": "--tuner_type full", "lora": LORA}.items():
        _goes_on = f"{_family} {_tuner} visual", "--mcore_model" if _tuner == "full" else "--mcore_adapter"
        CASES |= {
            f"{_family} {_tuner} plain": Case(None, _flags),
            f"{_family} {_tuner} all kept": Case(ALL_KEPT, _flags),
            f"{_family} {_tuner} regate": Case(SHOWN, _flags),
            f"{_family} {_tuner} visual": Case(VISUAL, _flags),
            f"{_family} {_tuner} resumed": Case(VISUAL, f"{_flags} --finetune false", _goes_on),
        }
    CASES |= {f"{_family} full padded": Case(SHOWN, PADDED), f"{_family} full padded plain": Case(None, PADDED)}
CASES |= {
    "qwen25 lora exported": Case(VISUAL, f"{LORA} --finetune false", ("qwen25 lora visual", "--adapters")),
    "qwen25 lora checkpoint": Case(VISUAL | {"teacher_load": FIRST}, LORA),
}
for _layout, _size in {"tp2": "tensor", "pp2": "pipeline"}.items():
    for _tuner, _flags in {"full": "", "lora": LORA}.items():
        _flags = f"{_flags} --{_size}_model_parallel_size 2"
        CASES[f"qwen25 {_tuner} {_layout}"] = Case(SHOWN, _flags, num_ranks=2)
_evaluates = "--val_dataset {folder}/rows.jsonl --eval_steps 2 --eval_iters 1"
CASES |= {"qwen25 full evaluated": Case(SHOWN, _evaluates), "qwen25 full evaluated plain": Case(None, _evaluates)}
for _family in FAMILIES:
    CASES[f"{_family} full dp2"] = Case(SHOWN, num_ranks=2)
    CASES[f"{_family} full cp2"] = Case(SHOWN, "--context_parallel_size 2", num_ranks=2)
CASES["qwen3 full tp2"] = Case(SHOWN, "--tensor_model_parallel_size 2", num_ranks=2)
_pp2 = "--pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 3"  # which take visual features in
CASES["qwen3 full pp2"] = Case(SHOWN, _pp2, num_ranks=2)
CASES["qwen25 lora merged"] = Case(SHOWN, LORA.removesuffix("--merge_lora false"), is_refused=True)
CASES["qwen25 lora_llm"] = Case(SHOWN, "--tuner_type lora_llm --no_save_optim true", is_refused=True)
PLUGIN = """
from regate_megatron import ReGateConfig
from regate_megatron.integrations import ms_swift

ms_swift.install(ReGateConfig(**{settings!r}))
"""


class Record(MegatronCallback):
    """What a training did, and how it left things behind, on the rank that plans; after ``regate`` among callbacks."""

    found: typing.ClassVar[dict[str, Any]] = {"losses": [], "evaluated": []}

    def on_train_begin(self) -> None:
        self.found["tuner"], self.found["packs"] = self.args.tuner_type, self.args.padding_free

    def on_step_end(self) -> None:
        session = session_of(self.trainer.wrapped_models)
        self.found["totals"] = dataclasses.asdict(session.totals) if session else None

    def on_log(self, logs: dict[str, Any]) -> None:
        ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
        for name, what in (("loss", "losses"), ("eval_loss", "evaluated")):
            self.found[what] += [logs[name]] if name in logs and not any(ranks) else []

    def on_train_end(self) -> None:
        is_there = session_of(self.trainer.wrapped_models) is not None
        is_patched = hasattr(base.get_forward_backward_func, "__wrapped__") or "train_step" in vars(self.trainer)
        self.found["restored"] = not is_there and not is_patched


megatron_callbacks_map["record"] = Record


def train(name: str, case: Case, folder: Path) -> None:
    """One rank of a case."""
    own = folder / name
    own.mkdir(exist_ok=True)
    model = folder / FAMILIES[name.split()[0]][1]
    line = f"{EXAMPLE} {CPU} {SMALL} {case.flags.format(folder=folder)} --callbacks".split()
    if case.regate is not None:
        settings = case.regate | {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 1, "trace": str(own / "trace")}
        if "teacher_load" in settings:
            settings["teacher_load"] = settings["teacher_load"].format(folder=folder)
        (own / "regate_plugin.py").write_text(PLUGIN.format(settings=settings))
        line += ["regate", "record", "--external_plugins", str(own / "regate_plugin.py")]
    else:
        line += ["record"]
    if case.goes_on:
        before, flag = case.goes_on
        line += [flag, str(folder / before / "checkpoint-2")]
    line += ["--model", str(model), "--dataset", str(folder / "rows.jsonl"), "--output_dir", str(own)]
    _shrink(model)
    sys.argv = ["sft", *line]
    runpy.run_module("swift.cli._megatron.sft", run_name="__main__")
    if Record.found["losses"]:
        (folder / f"{name}.json").write_text(json.dumps(Record.found))


def _shrink(model: Path) -> None:
    """What is written into ms-swift's code and is another here."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for kind in ("image", "video"):
        setattr(qwen.Qwen2VLTemplate, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    utils.TELinear = ColumnParallelLinear, RowParallelLinear  # what "all-linear" means
    sft.plot_images = lambda *_: None  # needs matplotlib
    # Unions that differ in their order alone are one to Python, and the parser takes one order of these two.
    MegatronArguments.__annotations__["cp_comm_type"] = typing.Optional[str]  # noqa: UP045


def write(folder: Path) -> None:
    """Models, with weights, and rows of a picture and a caption."""
    for family, name in FAMILIES.values():
        tiny_hf.write(folder / name, family)
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder / name)).save_pretrained(
            folder / name
        )
    rows = [json.loads(line) for line in tiny_hf.write_pictures(folder / "pictures").read_text().splitlines()]
    messages = [
        [{"role": "user", "content": "<image>Describe the picture."}, {"role": "assistant", "content": row["text"]}]
        for row in rows
    ]
    samples = [{"messages": one, "images": [row["image"]]} for one, row in zip(messages, rows, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))


def main(folder: str, *names: str) -> int:
    """Run the cases; the number of those that failed."""
    here, failed = Path(folder), 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # its threads do not live through a fork
    os.environ |= {"MODELSCOPE_CACHE": str(here / "cache"), "HF_DATASETS_CACHE": str(here / "datasets")}
    os.environ["SWIFT_SINGLE_DEVICE_MODE"] = "1"  # the one device that the emulation has
    write(here)
    for name in names or CASES:
        case = CASES[name]
        failed += run(name, case.num_ranks, here / f"{name}.log", partial(train, name, case, here)) == case.is_refused
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
