#!/usr/bin/env python3
"""Write the weights of a Megatron checkpoint for another layout: torch_dist to the legacy format at given tensor- and
pipeline-parallel sizes, the legacy format to torch_dist, or the legacy format to another layout.

torch_dist loads at any layout and needs no resharding; pretrain_vlm.py insists on the legacy format. Dense GPTModel and
LLaVAModel; weights and arguments only, bit for bit. One process, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.reshard import check_reshard, plan_reshard, reshard
from regate_megatron.checkpoints.weights import open_weights

EXAMPLES = """\
examples:
  python tools/reshard.py --source ckpt/llava --target ckpt/llava-tp4pp2 --format torch \\
      --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2
  python tools/reshard.py --source ckpt/legacy --target ckpt/any --format torch_dist"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument("--source", required=True, metavar="DIR", help="Megatron checkpoint, torch_dist or torch")
    parser.add_argument("--format", required=True, choices=("torch", "torch_dist"), help="format to write")
    for name in ("tensor", "pipeline"):
        parser.add_argument(f"--{name}-model-parallel-size", type=command.positive, default=1, metavar="N")
    command.add_implementation_option(parser)
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    layout = (options.tensor_model_parallel_size, options.pipeline_model_parallel_size)
    if options.format == "torch_dist":
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        command.refuse_options(options, sizes, where="with --format torch_dist, which loads at any layout")
    source = open_weights(options.source)
    plan = plan_reshard(source, format=options.format, layout=layout, implementation=options.transformer_impl)
    check_reshard(plan, options.target, overwrite=options.overwrite)
    before = f"TP{source.layout[0]} PP{source.layout[1]}" if source.layout else "any layout"
    after = f"TP{layout[0]} PP{layout[1]}" if plan.format == "torch" else "any layout"
    print(
        f"{source.path}: {source.format} ({before}) to {plan.format} ({after}), {len(source.weights)} tensors, "
        f"{source.num_layers} decoder layers, {source.num_bytes / 1e6:,.1f} MB"
    )
    rows = next(weight.shape[0] for name, weight in source.weights.items() if name.endswith("word_embeddings.weight"))
    if plan.format == "torch":
        print(f"vocabulary of {rows}: load it with --make-vocab-size-divisible-by {rows // layout[0]}, or what gave it")
    if not vars(source.arguments):
        print("it holds no arguments that can be read: the result holds its layout only")
    work = partial(reshard, plan, options.target, overwrite=options.overwrite)
    if command.write(options, source.num_bytes, "resharding", work):
        print(f"wrote {options.target}; weights only: load it with --finetune, or --no-load-optim --no-load-rng")


if __name__ == "__main__":
    sys.exit(main())
