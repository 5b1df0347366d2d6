"""The launcher: run a Megatron training script with ReGATE's flags.

    torchrun --nproc-per-node 8 -m regate_megatron SCRIPT <its flags> --regate --regate-teacher-load student
    torchrun --nproc-per-node 4 -m regate_megatron --cpu SCRIPT <its flags> --regate …    the same without a GPU (gloo)
    python -m regate_megatron dry-run torchrun … -m regate_megatron SCRIPT <its flags>    tries a cluster's launch line
    python -m regate_megatron estimate --length 4096 --targets 300 …    is it worth it on such data?
    python -m regate_megatron doctor    what this environment has, and what is supported
    python -m regate_megatron doctor --model NAME_OR_FOLDER    whether a Hugging Face model is, in which host, and how
    python -m regate_megatron --help    this text and ReGATE's flags; after SCRIPT: Megatron's flags and ReGATE's

The script runs unmodified; its own checkout comes first on the path, before an installed megatron-core. Without a flag
that starts with ``--regate`` nothing of Megatron is touched; without ``--regate`` itself nothing but its arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from regate_megatron import flags
from regate_megatron.config import ReGateConfig
from regate_megatron.cpu import launch


def main(argv: list[str], install: Callable[[ReGateConfig], None] | None = None) -> None:
    """Do what ``argv`` asks; exits with 1 and one line per refusal.

    Args:
        install: called after ReGATE is installed, to change what the script does further.
    """
    if argv in (["--help"], ["-h"], ["help"], ["--cpu", "--help"]):
        print(_help())
    elif argv and argv[0] in launch.COMMANDS and not Path(argv[0]).is_file():
        module = importlib.import_module(launch.COMMANDS[argv[0]])
        if argv[1:] in (["--help"], ["-h"]):
            print(module.__doc__.strip())
        elif code := module.main(argv[1:]):
            sys.exit(code)
    else:
        on_cpu = argv[:1] == ["--cpu"]
        launch.run_script(argv[on_cpu:], on_cpu=on_cpu, install=install)


def _help() -> str:
    parser = argparse.ArgumentParser(prog="regate_megatron", usage=argparse.SUPPRESS, add_help=False)
    return f"{__doc__.strip()}\n\n{flags.add_arguments(parser).format_help()}"


if __name__ == "__main__":
    main(sys.argv[1:])
