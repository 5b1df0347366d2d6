#!/usr/bin/env python3
"""Make a text-only teacher from a vision-language model: take its language model out, bit for bit.

The source is a Megatron LLaVA checkpoint (torch_dist), or a Hugging Face folder of LLaVA, Qwen2-VL, Qwen2.5-VL,
InternVL or another whose language model is a dense Llama, Mistral, Qwen2 or Qwen3. Runs on any machine that sees the
files: one process, no GPU, no Megatron; only the language model's bytes are read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.extraction import (
    open_inner_model,
    plan_huggingface_extraction,
    plan_megatron_extraction,
)
from regate_megatron.checkpoints.to_megatron import plan_to_megatron
from regate_megatron.errors import refuse

EXAMPLES = """\
examples:
  python tools/extract_teacher.py --source checkpoints/llava --target checkpoints/teacher
  python tools/extract_teacher.py --source Qwen2.5-VL-7B-Instruct --target checkpoints/teacher
  python tools/extract_teacher.py --source llava-1.5-7b-hf --target vicuna-7b --to-hf
  torchrun ... -m regate_megatron pretrain_vlm.py ... --regate --regate-teacher-load checkpoints/teacher

A Megatron source is a checkpoint folder (its latest iteration is taken) or the folder of one iteration, saved with
--ckpt-format torch_dist. A target in Megatron's format also loads into pretrain_gpt.py with --load DIR --finetune."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--source", required=True, metavar="DIR", help="Megatron LLaVA checkpoint or Hugging Face folder"
    )
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face causal language model")
    command.add_megatron_options(parser)
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    if not _is_huggingface(Path(options.source)):
        _from_megatron(options)
    elif options.to_hf:
        _to_huggingface(options)
    else:
        plan = plan_to_megatron(
            open_inner_model(options.source),
            tensor_size=options.tensor_model_parallel_size,
            divisor=options.make_vocab_size_divisible_by,
            dtype=command.DTYPES.get(options.dtype),
        )
        command.write_megatron(plan, options)


def _is_huggingface(source: Path) -> bool:
    """Checkpoints made by these tools have a config.json too."""
    megatron = ("latest_checkpointed_iteration.txt", "metadata.json")
    return (source / "config.json").is_file() and not any((source / name).is_file() for name in megatron)


def _to_huggingface(options: argparse.Namespace) -> None:
    command.refuse_options(options, command.MEGATRON_OPTIONS, where="with --to-hf, which copies bytes")
    plan = plan_huggingface_extraction(open_inner_model(options.source))
    if command.write(plan, options, str(plan), "copying"):
        print(f"wrote {options.target}")


def _from_megatron(options: argparse.Namespace) -> None:
    plan = plan_megatron_extraction(options.source)
    if options.to_hf:
        raise refuse(
            "--to-hf",
            given=f"{plan.source}, a Megatron checkpoint",
            allowed="a Hugging Face folder",
            change="the command: tools/export_student.py exports Megatron checkpoints",
        )
    command.refuse_options(options, command.MEGATRON_OPTIONS, where="for a Megatron checkpoint, whose bytes are copied")
    if command.write(plan, options, str(plan), "copying"):
        print(f"wrote {options.target}; use it with --regate-teacher-load {options.target}")


if __name__ == "__main__":
    sys.exit(main())
