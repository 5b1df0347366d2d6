"""The command-line flags: one for each field of the settings, and nothing of their own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from regate_megatron.config import WORDS, ReGateConfig, flag, shown_default
from regate_megatron.errors import ReGateError, refuse


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of ReGATE to ``parser``, with the defaults of :class:`ReGateConfig`; returns the parser.

    Ranges and choices are left to :class:`ReGateConfig`, so that every refusal has one form.
    """
    group = parser.add_argument_group(title="regate", description=WORDS)
    types = {"int": int, "float": float, "str": str, "str | None": str, "int | None": int, "float | None": float}
    for field in dataclasses.fields(ReGateConfig):
        help_text = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            default = "" if field.name == "enabled" else f" (default: {shown_default(field)})"
            group.add_argument(flag(field.name), action="store_true", help=help_text + default)
            continue
        choices, metavar = field.metadata["choices"], field.metadata["metavar"]
        group.add_argument(
            flag(field.name),
            type=types[str(field.type)],
            default=field.default,
            metavar="{" + ",".join(choices) + "}" if choices else metavar,
            help=f"{help_text} (default: {shown_default(field)})",
        )
    return parser


def parse(argv: Sequence[str]) -> ReGateConfig | None:
    """Read ReGATE's flags out of a command line, leaving every other flag alone; None without ``--regate``.

    Raises:
        ReGateError: a value is out of its range, or a flag that starts with ``--regate`` is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    try:
        args, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        name = error.argument_name or "command line"
        raise refuse(name, given=error.message, allowed="a value as --help describes it", change="the value") from None
    unknown = [word for word in rest if word.startswith("--regate")]
    if unknown:
        known = ", ".join(flag(field.name) for field in dataclasses.fields(ReGateConfig))
        raise refuse("command line", given=unknown[0], allowed=known, change="the spelling")
    return ReGateConfig.from_args(args)


def parse_command_line(argv: Sequence[str]) -> ReGateConfig | None:
    """:func:`parse` for a launcher: also refuses a score whose teacher is missing.

    Raises:
        ReGateError: as :func:`parse` and :meth:`ReGateConfig.require_teacher`; every rank has the same command line, so
            every rank raises.
    """
    try:
        config = parse(argv)
        if config is not None:
            config.require_teacher()
    except ReGateError as error:
        error.everywhere = True
        raise
    return config
