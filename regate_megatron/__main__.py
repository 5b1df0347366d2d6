"""The launcher: run a Megatron training script with ReGATE's flags.

    torchrun --nproc-per-node 8 -m regate_megatron SCRIPT <its flags> --regate --regate-teacher-load student
    torchrun --nproc-per-node 4 -m regate_megatron --cpu SCRIPT <its flags> --regate …    the same without a GPU (gloo)
    python -m regate_megatron dry-run torchrun … -m regate_megatron SCRIPT <its flags>    tries a cluster's launch line
    python -m regate_megatron doctor    what this environment has, and what is supported
    python -m regate_megatron --help    this text and ReGATE's flags; after SCRIPT: Megatron's flags and ReGATE's

The script runs unmodified; its own checkout comes first on the path, before an installed megatron-core. Without a flag
that starts with ``--regate`` nothing of Megatron is touched.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from regate_megatron import config as settings
from regate_megatron.errors import one_line_refusals, refuse

_USAGE = "torchrun … -m regate_megatron [--cpu] SCRIPT [its flags] [--regate …], dry-run LINE, doctor or --help"


def main(argv: list[str], install: Callable[[settings.ReGateConfig], None] | None = None) -> None:
    """Run the script named in ``argv``; exits with 1 and one line on a refusal.

    Args:
        install: called after ReGATE is installed, to change what the script does further.
    """
    if argv in (["--help"], ["-h"], ["help"], ["--cpu", "--help"]):
        print(_help())
        return
    if argv == ["doctor"] and not Path("doctor").is_file():
        from regate_megatron import doctor

        sys.exit(doctor.main())
    if argv[:1] == ["dry-run"] and not Path("dry-run").is_file():
        from regate_megatron.cpu import dry_run

        if argv[1:] in (["--help"], ["-h"]):
            print(dry_run.__doc__.strip())
        else:
            dry_run.main(argv[1:])
        return
    with one_line_refusals():
        on_cpu = argv[:1] == ["--cpu"]
        script, flags = _script_and_flags(argv[1:] if on_cpu else argv)
        config = settings.parse_command_line(flags)
        if on_cpu:
            from regate_megatron.cpu import emulation

            emulation.set_environment()
        sys.path[:0] = folders_of(script)
        if on_cpu:
            emulation.install()
            flags = emulation.adjust_arguments(flags)
        sys.argv = [script, *flags]
        if any(word.startswith("--regate") or word in ("--help", "-h") for word in flags):
            from regate_megatron.integrations import megatron_lm

            megatron_lm.add_flags()
            if config is not None:
                megatron_lm.check_flags(flags, config)
                megatron_lm.install(config)
                if install is not None:
                    install(config)
        runpy.run_path(script, run_name="__main__")
        if on_cpu:
            emulation.leave()


def _help() -> str:
    parser = argparse.ArgumentParser(prog="regate_megatron", usage=argparse.SUPPRESS, add_help=False)
    return f"{__doc__.strip()}\n\n{settings.add_arguments(parser).format_help()}"


def _script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    script = words[0] if words else ""
    if not Path(script).is_file():
        error = refuse("launcher", given=script or "no script", allowed=f"a script: {_USAGE}", change="the path")
        error.everywhere = True  # every rank has the same command line
        raise error
    return script, words[1:]


def folders_of(script: str) -> list[str]:
    """What comes first on the path: the script's folder, and the checkout it lies in (examples/… of Megatron-LM)."""
    folders = Path(script).resolve().parents
    checkout = next((str(folder) for folder in folders if (folder / "megatron/core/package_info.py").is_file()), None)
    return list(dict.fromkeys([str(folders[0]), *([checkout] if checkout else [])]))


if __name__ == "__main__":
    main(sys.argv[1:])
