"""Our flags in Megatron's parser, and what Megatron's flags alone tell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from regate_megatron import compat
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import ReGateError
from regate_megatron.flags import add_arguments, parse_command_line
from regate_megatron.integrations.patching import is_patched, patch
from regate_megatron.support import HostRun, folder_or_none, refusals, setting_of_flags


def add_flags() -> None:
    """Teach Megatron's parser our flags: every parse of every version looks ``add_megatron_arguments`` up there."""
    from megatron.training import arguments

    if not is_patched(arguments.add_megatron_arguments):
        wrappers = {"add_megatron_arguments": _with_our_flags}
        patch((arguments, wrappers, arguments.parse_args), allowed=f"megatron-core {compat.MEGATRON_CORE}")


def read_flags(flags: Sequence[str], script: str = "") -> ReGateConfig | None:
    """ReGATE's settings; None without ``--regate``. Needs our flags in Megatron's parser.

    Raises:
        ReGateError: everything that flags alone can tell is wrong, one line each, before Megatron does anything; every
            rank has the same flags, so every rank raises.
    """
    found, config = [], None
    try:
        config = parse_command_line(flags)
    except ReGateError as error:
        found.append(str(error))
    if config is not None or found:
        # Settings that could not be read are no reason to keep the other refusals back.
        found += _unsupported(flags, config or ReGateConfig(score="student", dense_layers=0), script)
    if found:
        raise ReGateError("\n".join(found), everywhere=True)
    return config


def run_of(args: Any, **others: Any) -> HostRun:
    """What Megatron-LM's namespace tells of its run, parsed or already validated; ``others`` it does not tell."""
    fsdp = [name for name in ("use_megatron_fsdp", "use_torch_fsdp2") if getattr(args, name, False)]
    told = {
        "iteration": getattr(args, "iteration", 0),
        "micro_batch_size": args.micro_batch_size or 1,
        "load": folder_or_none(args.load),
        "save": folder_or_none(args.save),
        "async_save": bool(args.async_save),
        "keeps_non_persistent": getattr(args, "non_persistent_ckpt_type", None) == "global",
        "non_persistent_folder": folder_or_none(getattr(args, "non_persistent_global_ckpt_dir", None)),
        "tokenizer_model": getattr(args, "tokenizer_model", None),
        "fsdp": "--" + fsdp[0].replace("_", "-") if fsdp else None,
        "document_masks": "--reset-attention-mask" if getattr(args, "reset_attention_mask", False) else None,
        "flags": args,
    }
    return HostRun(**told | others)


def _unsupported(flags: Sequence[str], config: ReGateConfig, script: str) -> list[str]:
    from megatron.training import arguments

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    try:
        args, _ = arguments.add_megatron_arguments(parser).parse_known_args(list(flags))
    except (argparse.ArgumentError, SystemExit):
        return []  # Megatron's own parser will say what is wrong
    return refusals(setting_of_flags(run_of(args), config, script), lambda rule: rule.in_flags)


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
