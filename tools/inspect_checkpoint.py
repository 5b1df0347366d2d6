#!/usr/bin/env python3
"""Say what is in a checkpoint: Megatron torch_dist, Megatron's legacy torch format, or a Hugging Face folder.

Format, iteration, arguments, tensors by layer pattern, number of parameters, and whether there are a language model, a
vision tower and ReGATE's own state. Nothing is written; nothing untrusted is unpickled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from regate_megatron.checkpoints import command
from regate_megatron.checkpoints.inspecting import Report, inspect_checkpoint

EXAMPLES = """\
examples:
  python tools/inspect_checkpoint.py checkpoints/llava
  python tools/inspect_checkpoint.py Qwen2.5-7B --json | jq .num_parameters"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="DIR", help="the checkpoint, or the folder of one iteration")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return command.run(parser, _work, argv)


def _work(options: argparse.Namespace) -> None:
    report = inspect_checkpoint(options.source, "DIR")
    if options.json:
        found = dataclasses.asdict(report) | {"num_parameters": report.num_parameters}
        print(json.dumps(found, indent=2, default=str))
    else:
        print(_text(report))


def _text(report: Report) -> str:
    lines = [f"{report.path}: {report.format}, {report.layout}"]
    if report.iteration is not None:
        lines.append(f"iteration: {report.iteration}")
    lines += [f"  {name} = {value}" for name, value in report.arguments.items()]
    for part in ("language model", "vision tower", "projector", "ReGATE state"):
        lines.append(f"{part}: {'yes' if part in report.parts else 'no'}")
    for part, groups in report.parts.items():
        lines.append(f"{part}:")
        width = max((len(group.name) for group in groups), default=0)
        for group in groups:
            shape = "x".join(map(str, group.shape)) or "scalar"
            lines.append(f"  {group.name:{width}}  {group.count:>4} of {shape} {group.dtype}")
    if report.objects:
        lines.append(f"objects: {', '.join(report.objects)}")
    lines.append(f"{report.num_parameters:,} parameters")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
