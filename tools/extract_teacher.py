#!/usr/bin/env python3
"""Make a text-only teacher from a LLaVA checkpoint: copy its language model into a GPT checkpoint, bit for bit.

Runs on any machine that sees the files: one process, no GPU, no Megatron; only the language model's bytes are read.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from regate_megatron.errors import ReGateError
from regate_megatron.teacher.extract import Extraction, check_target, extract, plan_extraction

EXAMPLE = """\
example:
  python tools/extract_teacher.py --source checkpoints/llava --target checkpoints/teacher
  torchrun ... -m regate_megatron pretrain_vlm.py ... --regate --regate-teacher-load checkpoints/teacher

The source is a checkpoint folder (its latest iteration is taken) or the folder of one iteration, saved with
--ckpt-format torch_dist. The target also loads into pretrain_gpt.py with --load DIR --finetune."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(argv)
    try:
        extraction = plan_extraction(options.source)
        check_target(extraction, options.target, overwrite=options.overwrite)
        print(_summary(extraction))
        if options.dry_run:
            print(f"dry run: nothing written to {options.target}")
            return 0
        with tqdm(total=extraction.num_bytes, unit="B", unit_scale=True, desc="copying", disable=None) as bar:
            extract(extraction, options.target, overwrite=options.overwrite, progress=bar.update)
    except ReGateError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {options.target}; use it with --regate-teacher-load {options.target}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, metavar="DIR", help="torch_dist checkpoint of a LLaVAModel")
    parser.add_argument("--target", required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the target")
    parser.add_argument("--dry-run", action="store_true", help="check both and say what would be copied")
    return parser.parse_args(argv)


def _summary(extraction: Extraction) -> str:
    dtypes = {str(extraction.metadata.state_dict_metadata[name].properties.dtype) for name in extraction.shapes}
    return (
        f"language model in {extraction.path}: {len(extraction.shapes)} tensors, {extraction.num_parameters:,} "
        f"parameters ({', '.join(sorted(dtypes)).replace('torch.', '')}), {extraction.num_bytes / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
