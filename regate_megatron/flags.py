"""The command-line flags: one for each field of the settings, and nothing of their own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from regate_megatron.config import WORDS, ReGateConfig, flag, shown_default
from regate_megatron.errors import ReGateError, given_to_argparse, nearest, refuse
from regate_megatron.method.recipes import RECIPES


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
            action=_Recipe if field.name == "recipe" else _Given,
            type=types[str(field.type)],
            default=field.default,
            metavar="{" + ",".join(choices) + "}" if choices else metavar,
            help=f"{help_text} (default: {shown_default(field)})",
        )
    return parser


class _Given(argparse.Action):
    """Stores a value, and that it was given: a recipe leaves it as it is."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, value)
        namespace.regate_given = [*getattr(namespace, "regate_given", ()), self.dest]


class _Recipe(_Given):
    """Stores a recipe's values too, so that every reader of the namespace finds what holds."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)  # the last of several wins, and nothing of the others stays
        super().__call__(parser, namespace, value, option)
        values = {name: parser.get_default(f"regate_{name}") for name in _values_of(before)} | dict(_values_of(value))
        for name, of_recipe in values.items():
            if f"regate_{name}" not in namespace.regate_given:
                setattr(namespace, f"regate_{name}", of_recipe)


def _values_of(recipe: str | None) -> Mapping[str, Any]:
    return RECIPES[recipe].values if recipe in RECIPES else {}


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
        name, given = error.argument_name or "command line", given_to_argparse(error)
        raise refuse(name, given=given, allowed="a value as --help describes it", change="the value") from None
    unknown = [word for word in rest if word.startswith("--regate")]
    if unknown:
        known = [flag(field.name) for field in dataclasses.fields(ReGateConfig)]
        change = nearest(unknown[0].partition("=")[0], known)
        raise refuse("command line", given=unknown[0], allowed=", ".join(known), change=change)
    return config_of(args)


def config_of(args: argparse.Namespace) -> ReGateConfig | None:
    """The settings in a parsed namespace; None when ``--regate`` is absent.

    Raises:
        ReGateError: values are out of their range, one line each.
    """
    if not getattr(args, "regate", False):
        return None
    names = [field.name for field in dataclasses.fields(ReGateConfig) if field.name != "enabled"]
    values = {name: getattr(args, f"regate_{name}") for name in names}
    found: dict[str, ReGateError] = {}
    while True:
        try:
            config = ReGateConfig(**values)
        except ReGateError as error:
            if error.field in values:
                found[error.field] = error
                del values[error.field]  # its default is in range: what else is wrong?
                continue
            if not found:
                raise
        if found:
            raise ReGateError("\n".join(map(str, found.values())))
        return config


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
