"""Our flags in Megatron's parser, and what Megatron's flags alone tell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from regate_megatron import compat
from regate_megatron.config import ReGateConfig, add_arguments
from regate_megatron.errors import ReGateError
from regate_megatron.integrations.patching import is_patched, patch
from regate_megatron.support import check_support, setting_of_flags


def add_flags() -> None:
    """Teach Megatron's parser our flags: every parse of every version looks ``add_megatron_arguments`` up there."""
    from megatron.training import arguments

    if not is_patched(arguments.add_megatron_arguments):
        wrappers = {"add_megatron_arguments": _with_our_flags}
        patch((arguments, wrappers, arguments.parse_args), allowed=f"megatron-core {compat.MEGATRON_CORE}")


def check_flags(flags: Sequence[str], config: ReGateConfig) -> None:
    """Refuse what Megatron's flags alone tell is not supported, before Megatron does anything.

    Raises:
        ReGateError: every rank has the same flags, so every rank raises.
    """
    from megatron.training import arguments

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    try:
        args, _ = arguments.add_megatron_arguments(parser).parse_known_args(list(flags))
    except (argparse.ArgumentError, SystemExit):
        return  # Megatron's own parser will say what is wrong
    supported, reason = check_support(setting_of_flags(args, config), flags_only=True)
    if not supported:
        raise ReGateError(reason, everywhere=True)


def _with_our_flags(inner: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any, *args: Any, **kwargs: Any) -> Any:
        return add_arguments(_with_printable_help(inner(parser, *args, **kwargs)))

    return add_megatron_arguments


def _with_printable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Help texts with a lone % (core 0.18.2, 0.19.0 and 0.20-dev have one) would end ``--help`` in a traceback."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser
