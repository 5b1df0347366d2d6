"""The line as it is given, checked at the cluster's number of ranks without starting any."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.cpu import emulation
from regate_megatron.cpu.dry_run.flags import without
from regate_megatron.cpu.dry_run.line import LaunchLine
from regate_megatron.errors import refuse


def validate(line: LaunchLine) -> Any:
    """Megatron's namespace of the line, validated as rank 0 of the cluster would, and its transformer config built.

    Flags of the script's own are left to the run. What names a path or a GPU's precision is left out here.

    Raises:
        ReGateError: Megatron would refuse the line; with its words.
    """
    from megatron.training import arguments

    paths = ("--load", "--save", "--tensorboard-dir", "--wandb", "--data-cache-path", "--pretrained-checkpoint")
    flags = without(
        line.flags, (*paths, "--fp8", "--fp4", "--inprocess", "--num-layers-at-", "--first-last-layers-bf16")
    )
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


def check_regate(line: LaunchLine, config: ReGateConfig) -> None:
    """ReGATE's refusals for the line as it is, and its teacher's folder.

    Raises:
        ReGateError: something is not supported, or the teacher cannot be read.
    """
    from regate_megatron.integrations.flags import check_flags
    from regate_megatron.teacher.weights import open_language_model

    check_flags(without(line.flags, ("--fp8", "--fp4")), config)
    if config.needs_teacher and config.teacher_load != STUDENT_AS_TEACHER and Path(config.teacher_load).exists():
        open_language_model(config.teacher_load, flag("teacher_load"))
