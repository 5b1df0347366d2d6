#!/usr/bin/env python3
"""Export a trained student (a LLaVAModel or a GPTModel in a torch_dist checkpoint) to Hugging Face.

With --like to a Hugging Face LLaVA, a LLaVAModel with CLIP's tower and a projector of two layers is exported whole; of
any other student the language model is, and the tool says why. Families: Llama, Mistral, Qwen2, Qwen3. Config,
tokenizer and image processor come from --like, whose constants must be those the student was trained with.
"""

from __future__ import annotations

import argparse
import sys

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.llava_to_huggingface import PARTS, plan_student

EXAMPLES = """\
examples:
  python tools/export_student.py --source checkpoints/student --like llava-1.5-7b-hf --target student-hf
  python tools/export_student.py --source checkpoints/student --like Qwen2.5-7B --target student-text-hf
  python tools/export_student.py --source checkpoints/student/iter_0002000 --family llama --target student-text-hf"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument("--source", required=True, metavar="DIR", help="torch_dist checkpoint of the student")
    parser.add_argument(
        "--part", choices=PARTS, help="what to export (default: all where Hugging Face has such a model)"
    )
    command.add_huggingface_options(parser)
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    plan, reason = plan_student(
        options.source,
        part=options.part,
        like=options.like,
        family=options.family,
        vocab_size=options.vocab_size,
    )
    if reason is not None:
        print(f"the language model only, of {plan.reader.path}, {reason}")
    command.write_huggingface(plan, options)


if __name__ == "__main__":
    sys.exit(main())
