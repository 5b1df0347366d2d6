#!/usr/bin/env python3
"""Convert a whole Hugging Face LLaVA (CLIP tower, projector, Llama, Mistral, Qwen2 or Qwen3) to a checkpoint of
Megatron's LLaVAModel, from which a student starts.

One process, no GPU; weights are streamed. The checkpoint is in the torch_dist format, which any layout loads. The tower
ends with the layer whose output LLaVA uses. tools/export_student.py leads back.
"""

from __future__ import annotations

import argparse
import sys

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.llava_to_megatron import plan_llava_to_megatron, unused_layers

EXAMPLES = """\
examples:
  python tools/import_student.py --source llava-1.5-7b-hf --target checkpoints/student --tensor-model-parallel-size 4
  python tools/extract_teacher.py --source llava-1.5-7b-hf --target checkpoints/teacher --tensor-model-parallel-size 4
  python tools/export_student.py --source checkpoints/trained --like llava-1.5-7b-hf --target llava-trained-hf"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument("--source", required=True, metavar="DIR", help="Hugging Face folder of a LLaVA")
    command.add_megatron_options(parser)
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="whose names the norms get: with the linear layer behind, or apart (default: %(default)s)",
    )
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    plan, vision = plan_llava_to_megatron(
        options.source,
        tensor_size=options.tensor_model_parallel_size,
        divisor=options.make_vocab_size_divisible_by,
        dtype=command.DTYPES.get(options.dtype),
        implementation=options.transformer_impl,
    )
    command.write_megatron(plan, options, "--load")
    print(f"its tower, to be built so by the model provider: {vision.architecture}")
    if unused := unused_layers(vision):
        print(f"left behind, as LLaVA does not use their output: {len(unused)} of the tower's layers, post_layernorm")


if __name__ == "__main__":
    sys.exit(main())
