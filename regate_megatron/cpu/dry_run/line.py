"""A launch line, taken apart."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from regate_megatron.errors import given_to_argparse, nearest, refuse

USAGE = "python -m regate_megatron dry-run [--nproc N] [--max-ranks N] [--timeout S] torchrun … SCRIPT <flags>"


@dataclass(frozen=True)
class LaunchLine:
    """What a launch line asks for.

    Attributes:
        script: path of the training script.
        flags: the script's own flags.
        num_ranks: ranks of the cluster.
        max_ranks: most ranks to start here; None: as many as memory holds.
        timeout_s: seconds after which the run is ended.
        is_bare: whether it starts a script that knows no flag of ours without ``-m regate_megatron``; not so where the
            launcher is left out, too, as in ``dry-run --nproc N SCRIPT``.
    """

    script: str
    flags: list[str]
    num_ranks: int
    max_ranks: int | None
    timeout_s: float
    is_bare: bool = False

    @property
    def options(self) -> set[str]:
        """Names of the script's options, given as ``--name value`` or as ``--name=value``."""
        return {word.partition("=")[0] for word in self.flags if word.startswith("--")}


def parse_line(words: list[str]) -> LaunchLine:
    """Take a launch line apart.

    Raises:
        ReGateError: no script, no such file, an option or a number out of range, or ranks that are not said.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--max-ranks", type=int)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("line", nargs=argparse.REMAINDER)
    try:
        own, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        given = given_to_argparse(error)
        raise refuse(f"dry-run: {error.argument_name}", given=given, allowed="a number", change="it") from None
    if unknown:
        change = nearest(unknown[0].partition("=")[0], ("--nproc", "--max-ranks", "--timeout"), "the command")
        raise refuse("dry-run", given=unknown[0], allowed=USAGE, change=change)
    for name in ("max_ranks", "timeout"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            given = f"--{name.replace('_', '-')} {value:g}"
            raise refuse("dry-run", given=given, allowed="more than 0", change="it, or leave it out")
    line, num_ranks = own.line, own.nproc
    after = _after_python(line)
    torch_launcher = after[:2] in (["-m", "torch.distributed.run"], ["-m", "torch.distributed.launch"])
    if torch_launcher or (line and Path(line[0]).name == "torchrun"):
        line, ranks_of_line = _torchrun(after[2:] if torch_launcher else line[1:])
        num_ranks = num_ranks or ranks_of_line
    line = _after_python(line)
    is_bare = line[:2] != ["-m", "regate_megatron"] and own.line[:1] != line[:1]
    line = line[2:] if line[:2] == ["-m", "regate_megatron"] else line
    line = line[1:] if line[:1] == ["--cpu"] else line
    if not line or not Path(line[0]).is_file():
        script = next((word for word in line[1:] if word.endswith(".py")), "SCRIPT")
        is_path = not line or line[0].endswith(".py")
        change = "the script's path" if is_path else f"it to: dry-run --nproc N {script} <its flags>"
        raise refuse("dry-run", given=line[0] if line else "no script", allowed=USAGE, change=change)
    if num_ranks is None or num_ranks < 1:
        raise refuse(
            "dry-run", given=f"{num_ranks} ranks", allowed="1 or more", change="--nproc to the cluster's ranks"
        )
    is_bare = is_bare and "regate" not in Path(line[0]).read_text(errors="replace")  # as patched ones say
    return LaunchLine(line[0], line[1:], num_ranks, own.max_ranks, own.timeout, is_bare)


def _after_python(words: list[str]) -> list[str]:
    """The words after ``python`` and its switches that take no value; the words themselves where no python begins."""
    if not words or not re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        return words
    rest = words[1:]
    while rest and re.fullmatch(r"-[bBdEiIOqsSuvx]+", rest[0]):
        rest = rest[1:]
    return rest


def _torchrun(words: list[str]) -> tuple[list[str], int | None]:
    """The words after torchrun's own options, and the ranks those options ask for."""
    from torch.distributed.run import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = get_args_parser().parse_args(words)
    except SystemExit:
        raise refuse("dry-run", given="options torchrun does not know", allowed=USAGE, change="the line") from None
    module = ["-m", options.training_script] if options.module else [options.training_script]
    try:
        nodes = int(str(options.nnodes).split(":")[-1])
        num_ranks = nodes * int(options.nproc_per_node)
    except ValueError:  # "gpu", "auto": as many as that machine has
        num_ranks = None
    return [*module, *options.training_script_args], num_ranks
