#!/usr/bin/env python3
"""Convert a dense Hugging Face language model (Llama, Mistral, Qwen2, Qwen3) to a Megatron checkpoint, or back.

One process, no GPU; weights are streamed. The Megatron checkpoint is in the torch_dist format, which any tensor-,
pipeline- or data-parallel layout loads. Both directions are bit-exact.
"""

from __future__ import annotations

import argparse
import sys

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.text_model import open_text_model
from regate_megatron.checkpoints.to_huggingface import plan_to_huggingface
from regate_megatron.checkpoints.to_megatron import plan_to_megatron

EXAMPLES = """\
examples:
  python tools/convert_hf_teacher.py --source Qwen2.5-7B --target checkpoints/teacher --tensor-model-parallel-size 4
  torchrun ... -m regate_megatron pretrain_vlm.py ... --regate --regate-teacher-load checkpoints/teacher
  torchrun ... pretrain_gpt.py <the printed flags> --load checkpoints/teacher --finetune
  python tools/convert_hf_teacher.py --to-hf --source checkpoints/teacher --target Qwen2.5-7B-again"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument("--source", required=True, metavar="DIR", help="Hugging Face folder; with --to-hf a checkpoint")
    parser.add_argument("--to-hf", action="store_true", help="from Megatron (torch_dist) to Hugging Face")
    command.add_megatron_options(parser)
    command.add_huggingface_options(parser)
    return command.run(parser, _to_hf_or_megatron, argv)


def _to_hf_or_megatron(options: argparse.Namespace) -> None:
    (_to_huggingface if options.to_hf else _to_megatron)(options)


def _to_megatron(options: argparse.Namespace) -> None:
    command.refuse_options(options, command.HUGGINGFACE_OPTIONS, where="without --to-hf")
    plan = plan_to_megatron(
        open_text_model(options.source, inside=False),
        tensor_size=options.tensor_model_parallel_size,
        divisor=options.make_vocab_size_divisible_by,
        dtype=command.DTYPES.get(options.dtype),
    )
    command.write_megatron(plan, options)


def _to_huggingface(options: argparse.Namespace) -> None:
    command.refuse_options(options, command.MEGATRON_OPTIONS, where="with --to-hf, which keeps weights as they are")
    plan = plan_to_huggingface(options.source, like=options.like, family=options.family, vocab_size=options.vocab_size)
    command.write_huggingface(plan, options)


if __name__ == "__main__":
    sys.exit(main())
