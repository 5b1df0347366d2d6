#!/usr/bin/env python3
"""Export the language model of a trained student (a LLaVAModel or a GPTModel in a torch_dist checkpoint) as a Hugging
Face causal language model.

Its family must be Llama, Mistral, Qwen2 or Qwen3. With --like, config and tokenizer come from that Hugging Face folder
(also that of a vision-language model), and must agree with how the student was trained. Vision tower and projector stay
behind.
"""

from __future__ import annotations

import argparse
import sys

from regate_megatron.convert import command
from regate_megatron.convert.to_huggingface import plan_to_huggingface

EXAMPLES = """\
examples:
  python tools/export_student.py --source checkpoints/student --like Qwen2.5-7B --target student-hf
  python tools/export_student.py --source checkpoints/student/iter_0002000 --family llama --target student-hf"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(__doc__, EXAMPLES)
    parser.add_argument("--source", required=True, metavar="DIR", help="torch_dist checkpoint of the student")
    command.add_huggingface_options(parser)
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    plan = plan_to_huggingface(options.source, like=options.like, family=options.family, vocab_size=options.vocab_size)
    command.write_huggingface(plan, options)
    print("the language model only: vision tower and projector stay in Megatron's format")


if __name__ == "__main__":
    sys.exit(main())
