"""The launcher: run a Megatron training script with ReGATE's flags.

    torchrun --nproc-per-node 8 -m regate_megatron pretrain_gpt.py <its flags> --regate --regate-teacher-load student
    torchrun --nproc-per-node 4 -m regate_megatron --cpu pretrain_gpt.py <its flags> --regate …    (no GPU: gloo)

The script runs unmodified; its own checkout comes first on the path, before an installed megatron-core. Without a flag
that starts with ``--regate`` nothing of Megatron is touched.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from regate_megatron import config as settings
from regate_megatron.errors import ReGateError, refuse

_USAGE = "torchrun … -m regate_megatron [--cpu] SCRIPT [its flags] [--regate …]"


def main(argv: list[str]) -> None:
    """Run the script named in ``argv``; exits with 1 and one line on a refusal."""
    try:
        _run(argv)
    except ReGateError as error:
        if error.everywhere and int(os.environ.get("RANK", 0)):
            sys.exit(1)
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


def _run(argv: list[str]) -> None:
    on_cpu = argv[:1] == ["--cpu"]
    script, *flags = argv[1:] if on_cpu else argv
    config = _parse(script, flags)
    if on_cpu:
        from regate_megatron import emulation

        emulation.set_environment()
    folder = str(Path(script).resolve().parent)
    sys.path.insert(0, folder)
    if on_cpu:
        emulation.install()
        flags = emulation.adjust_arguments(flags)
    sys.argv = [script, *flags]
    if any(word.startswith("--regate") for word in flags) or "--help" in flags or "-h" in flags:
        _add_flags()
    if config is not None:
        from regate_megatron.integrations import megatron_lm

        megatron_lm.install(config)
    runpy.run_path(script, run_name="__main__")


def _parse(script: str | None, flags: list[str]) -> settings.ReGateConfig | None:
    try:
        if script is None or not Path(script).is_file():
            given = script or "no script"
            raise refuse("launcher", given=given, allowed=f"a training script: {_USAGE}", change="the path")
        config = settings.parse(flags)
        if config is not None:
            config.require_teacher()
    except ReGateError as error:
        error.everywhere = True  # every rank reads the same command line
        raise
    return config


def _add_flags() -> None:
    """Teach Megatron's parser our flags: every parse of every version looks ``add_megatron_arguments`` up here."""
    from megatron.training import arguments

    inner = arguments.add_megatron_arguments
    if not hasattr(inner, "_regate"):

        def add_megatron_arguments(parser, *args, **kwargs):
            return settings.add_arguments(inner(parser, *args, **kwargs))

        add_megatron_arguments._regate = True
        arguments.add_megatron_arguments = add_megatron_arguments


if __name__ == "__main__":
    main(sys.argv[1:] or [None])
