"""Run a Megatron training script with ReGATE's flags: what the launcher and the dry run have in common."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from regate_megatron import compat
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import nearest, one_line_refusals, refuse

COMMANDS = {
    "dry-run": "regate_megatron.cpu.dry_run",
    "estimate": "regate_megatron.cpu.estimate",
    "doctor": "regate_megatron.doctor",
}
"""What is no script, unless there is one of that name; and the module that does it."""

USAGE = (
    "torchrun … -m regate_megatron [--cpu] SCRIPT [its flags] [--regate …], dry-run LINE, estimate …, doctor or --help"
)


def run_script(
    words: Sequence[str], *, on_cpu: bool = False, install: Callable[[ReGateConfig], None] | None = None
) -> None:
    """Run the script that ``words`` begin with; exits with 1 and one line per refusal. Every rank calls it.

    Args:
        on_cpu: under the emulation.
        install: called after ReGATE is installed, to change what the script does further.
    """
    with one_line_refusals():
        script, flags = _script_and_flags(words)
        use_checkout_of(script)
        if on_cpu:
            from regate_megatron.cpu import emulation

            emulation.set_environment()
            compat.require_megatron()
            emulation.install()
            flags = emulation.adjust_arguments(flags)
        sys.argv = [script, *flags]
        if any(word.startswith("--regate") or word in ("--help", "-h") for word in flags):
            from regate_megatron.integrations import megatron_lm

            compat.require_megatron()
            megatron_lm.add_flags()
            config = megatron_lm.read_flags(flags, script)
            if config is None:
                _say_what_is_idle(flags)
            else:
                megatron_lm.install(config)
                if install is not None:
                    install(config)
        runpy.run_path(script, run_name="__main__")
        if on_cpu:
            emulation.leave()


def _say_what_is_idle(flags: Sequence[str]) -> None:
    """Say on rank 0 which of our flags do nothing: a line may keep them while ReGATE is switched off and on."""
    idle = [word.partition("=")[0] for word in flags if word.startswith("--regate")]
    if idle and int(os.environ.get("RANK", 0)) == 0:
        print(f"[regate] off: {', '.join(idle)} given without --regate; add --regate to train with it", flush=True)


def use_checkout_of(script: str) -> None:
    """Import from the script's folder first, then from the checkout it lies in (examples/… of Megatron-LM)."""
    folders = Path(script).resolve().parents
    checkout = next((str(folder) for folder in folders if (folder / "megatron/core/package_info.py").is_file()), None)
    sys.path[:0] = dict.fromkeys([str(folders[0]), *([checkout] if checkout else [])])


def _script_and_flags(words: Sequence[str]) -> tuple[str, list[str]]:
    script = words[0] if words else ""
    if not Path(script).is_file():
        change = nearest(script, COMMANDS, "the path" if script else "the command")
        if script in COMMANDS:
            change = "the command: leave --cpu out"
        elif script.startswith("-"):
            change = "the order: the script comes before its flags"
        error = refuse("launcher", given=script or "no script", allowed=f"a script: {USAGE}", change=change)
        error.everywhere = True  # every rank has the same command line
        raise error
    return script, list(words[1:])
