"""The line as it is given, checked at the cluster's number of ranks without starting any."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.cpu import emulation
from regate_megatron.cpu.dry_run.flags import parser_of_megatron
from regate_megatron.cpu.dry_run.line import LaunchLine
from regate_megatron.cpu.dry_run.shrink import LAYER_LISTS, least_ranks
from regate_megatron.cpu.emulation.arguments import PRECISION, take_out, without
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.support import Setting, refusals

# What no dry run can follow, and why.
_OTHER_RUNS = {
    "--skip-train": "the line only evaluates",
    "--yaml-cfg": "the file replaces the flags, which are what is shrunk",
    "--perform-rl-step": "rollouts need an inference engine on GPUs",
}


def check(line: LaunchLine) -> tuple[Any, ReGateConfig | None]:
    """Megatron's validated namespace of the line, and ReGATE's settings.

    Support is judged with the flags as given, before anything is shrunk or taken out.

    Raises:
        ReGateError: all that is wrong as far as the line alone can tell, one line each.
    """
    from regate_megatron.integrations.flags import read_flags

    found: list[str] = []

    def ask(question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(*args)
        except ReGateError as error:
            found.append(str(error))

    config = ask(read_flags, line.flags, line.script)
    ask(_check_kind, line)
    cluster = None
    ask(_check_ranks, line)
    if not any("number of ranks" in one for one in found):
        cluster = ask(validate, line)
    if config is not None:
        ask(_check_teacher, config)
    if config is not None and cluster is not None:
        ask(_check_dense_layers, cluster, config)
    if found:
        raise ReGateError("\n".join(found))
    return cluster, config


def _check_kind(line: LaunchLine) -> None:
    for name, why in _OTHER_RUNS.items():
        if name in line.options:
            raise refuse(
                "dry-run", given=f"{name}: {why}", allowed="a line that trains", change=f"it: leave {name} out here"
            )


def _check_ranks(line: LaunchLine) -> None:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = parser_of_megatron().parse_known_args(line.flags)[0]
    except SystemExit:
        return  # validation says what is wrong
    multiple = least_ranks(options)
    if line.num_ranks % multiple:
        raise refuse(
            "number of ranks",
            given=line.num_ranks,
            allowed=f"a multiple of {multiple}, by the tensor, pipeline, context and expert parallel sizes",
            change=f"it to {multiple * -(-line.num_ranks // multiple)}, or the sizes",
        )


def validate(line: LaunchLine) -> Any:
    """Megatron's namespace of the line, validated as rank 0 of the cluster would, and its transformer config built.

    Flags of the script's own are left to the run. What names a path or a GPU's precision is left out here.

    Raises:
        ReGateError: Megatron would refuse the line; with its words.
    """
    from megatron.training import arguments

    known = parser_of_megatron()._option_string_actions
    paths = "--load* --save* --tensorboard-dir --wandb* --data-cache-path --pretrained-checkpoint --inprocess*"
    flags = take_out(without(line.flags, paths.split(), known), PRECISION, known)[0]
    before, said = (sys.argv, dict(os.environ)), io.StringIO()
    sys.argv = [line.script, *emulation.adjust_arguments(flags)]
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(line.num_ranks), "LOCAL_RANK": "0"}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            args = arguments.parse_args(ignore_unknown_args=True)
            arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
            arguments.core_transformer_config_from_args(args)
    except (Exception, SystemExit) as error:
        reason = str(error) if not isinstance(error, SystemExit) else said.getvalue().strip().rsplit("\n", 1)[-1]
        raise refuse(
            f"{Path(line.script).name} at {line.num_ranks} ranks",
            given=f"{type(error).__name__}: {reason}",
            allowed="what Megatron's own validation accepts",
            change="the flag it names",
        ) from None
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
    return args


def _check_dense_layers(cluster: Any, config: ReGateConfig) -> None:
    """Here, as a layout with fewer stages has more layers in its first. Listed layers are kept, and their stages."""
    from megatron.training.arguments import core_transformer_config_from_args

    from regate_megatron.integrations.flags import run_of

    if any(getattr(cluster, name, None) for name in LAYER_LISTS):
        return
    with contextlib.redirect_stdout(io.StringIO()):
        chunk = SimpleNamespace(config=core_transformer_config_from_args(cluster))
    found = refusals(Setting([chunk], config, run_of(cluster)), lambda rule: rule.what == flag("dense_layers"))
    if found:
        raise ReGateError(found[0])


def _check_teacher(config: ReGateConfig) -> None:
    from regate_megatron.teacher.weights import open_language_model

    if config.needs_teacher and config.teacher_load != STUDENT_AS_TEACHER and Path(config.teacher_load).exists():
        open_language_model(config.teacher_load, flag("teacher_load"))
