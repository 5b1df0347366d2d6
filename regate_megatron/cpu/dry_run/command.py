"""The dry run: check the line, run it small, say what came of it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from regate_megatron import __main__ as launcher
from regate_megatron import compat
from regate_megatron import config as settings
from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig
from regate_megatron.cpu import emulation
from regate_megatron.cpu.dry_run import cluster as checks
from regate_megatron.cpu.dry_run.flags import small_flags
from regate_megatron.cpu.dry_run.line import LaunchLine, parse_line
from regate_megatron.cpu.dry_run.shrink import TRAIN_STEPS, data_parallel_size, dense_group
from regate_megatron.cpu.emulation import forked
from regate_megatron.errors import one_line_refusals, refuse

_GB_PER_RANK = 0.3  # a fork of this process, its small model, and the queue it forks to save checkpoints: measured 0.2
_NOT_CHECKED = "GPU kernels and memory, NCCL, FP8 arithmetic, speed, the values of your data"


def main(words: list[str]) -> None:
    """Run the command; exits with 1 and one line when the line would not run."""
    with one_line_refusals():
        line = parse_line(words)
        config = settings.parse_command_line(line.flags)
        emulation.set_environment()
        sys.path[:0] = launcher.folders_of(line.script)
        emulation.install()
        cluster = checks.validate(line)
        if config is not None:
            checks.check_regate(line, config)
        replicas = _replicas(line, cluster)
        with tempfile.TemporaryDirectory(prefix="regate-dry-run-") as folder:
            flags, said = small_flags(line, cluster, config, replicas=replicas, folder=Path(folder))
            print(f"[dry run] the flags pass at {line.num_ranks} ranks; now {_layout(cluster, replicas)}", flush=True)
            output = _run(line, flags, dense_group(cluster) * replicas, Path(folder))
        _report(line, cluster, config, replicas, said, output)


def _replicas(line: LaunchLine, cluster: Any) -> int:
    """How many data-parallel replicas to run here.

    Raises:
        ReGateError: not even the fewest fit.
    """
    free = _available_gb()
    fit = int(free / _GB_PER_RANK) if free < math.inf else cluster.world_size
    replicas = data_parallel_size(cluster, min(fit, line.max_ranks or fit))
    if replicas is not None:
        return replicas
    fewest = data_parallel_size(cluster, cluster.world_size) * dense_group(cluster)
    if fit < fewest:
        raise refuse(
            "dry-run",
            given=f"a layout of at least {fewest} ranks and {free:.1f} GB of free memory",
            allowed=f"{_GB_PER_RANK} GB per rank",
            change="the machine, or try a smaller tensor or pipeline size here",
        )
    raise refuse(
        "dry-run",
        given=f"a layout of at least {fewest} ranks and --max-ranks {line.max_ranks}",
        allowed="a layout that fits into that many",
        change="--max-ranks, or try a smaller tensor or pipeline size here",
    )


def _available_gb() -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) / 2**20 if found else math.inf
    return math.inf


def _run(line: LaunchLine, flags: list[str], num_ranks: int, folder: Path) -> str:
    """Run the small line on this machine; its output.

    Raises:
        ReGateError: it failed or took too long; the refusal's one line, or the error that ended it.
    """
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    def work() -> None:
        torch.set_num_threads(1)
        tempfile.tempdir = None  # TMPDIR has changed
        launcher.main(["--cpu", line.script, *flags])

    log, env = folder / "log", {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
    ended = forked.run(num_ranks, work, log=log, timeout_s=line.timeout_s, env=env)
    output = "\n".join(Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(num_ranks))
    if any(ended.codes):
        raise _failed(line, _reason(output, ended, line.timeout_s), output)
    return output


def _failed(line: LaunchLine, reason: str, output: str) -> Exception:
    kept = Path(tempfile.gettempdir()) / f"regate-dry-run-{os.getpid()}.log"
    kept.write_text(output)
    return refuse(
        f"dry run of {Path(line.script).name}",
        given=reason,
        allowed="a line that trains",
        change=f"what it names; all output is in {kept}",
    )


def _reason(output: str, ended: forked.Ended, timeout_s: float) -> str:
    """Why a run ended, in one line: our refusal, the parser's complaint, a killed rank, or the first error."""
    if ended.timed_out:
        return f"no end after {timeout_s:.0f} s"
    if ended.first == -signal.SIGKILL:
        return "a rank killed by the system, most likely for want of memory"
    for pattern in (r"^regate: .*", r"^.*\.py: error: .*", r"^(?:\[rank\d+\]: )?\w*(?:Error|Exception)\b.*"):
        if found := re.search(pattern, output, re.M):
            return found[0]
    return "an end without a reason"


def _report(
    line: LaunchLine, cluster: Any, config: ReGateConfig | None, replicas: int, said: list[str], output: str
) -> None:
    """Check what the run printed and print the summary.

    Raises:
        ReGateError: it ended well, but did not do what it should have.
    """
    done = {
        "its last step": f"iteration {TRAIN_STEPS:8d}/{TRAIN_STEPS:8d}" in output,
        "an evaluation": "validation loss at iteration" in output,
    }
    sparse = re.findall(r"^\[regate\] iteration .*\| sparse .*", output, re.M)
    if config is not None and config.elides:
        done["a sparse step"] = bool(sparse)
    if "--save" in line.options:
        done["a checkpoint"] = "successfully saved checkpoint" in output
    for what, was_done in done.items():
        if not was_done:
            raise _failed(line, f"a run without {what}", output)
    attached = re.findall(r"^\[regate\] attached to (.*?):", output, re.M)
    lines = [
        f"line        {Path(line.script).name} at {line.num_ranks} ranks: {_layout(cluster)}",
        f"checked     Megatron accepts the flags at {line.num_ranks} ranks ({compat.versions()})",
        f"            {_layout(cluster, replicas)} ran {TRAIN_STEPS} steps: {', '.join(done)}",
    ]
    if attached:
        lines.append(f"            ReGATE on {attached[0]}; {len(sparse)} sparse steps, the last:")
        lines += [f"            {sparse[-1].split('| ', 1)[1].split(' | per step')[0]}"] if sparse else []
    lines += [f"{'shrunk' if index == 0 else '':12}{one}" for index, one in enumerate(said)]
    lines.append(f"not checked {_NOT_CHECKED}")
    print("\n".join(f"[dry run] {one}" for one in lines))
    if config is not None and config.teacher_load != STUDENT_AS_TEACHER and config.needs_teacher:
        print(f"[dry run]             the teacher {config.teacher_load} was not run: the small student took its place")
    print("[dry run] ok")


def _layout(cluster: Any, replicas: int | None = None) -> str:
    sizes = {
        "TP": cluster.tensor_model_parallel_size,
        "PP": cluster.pipeline_model_parallel_size,
        "VPP": cluster.virtual_pipeline_model_parallel_size,
        "CP": cluster.context_parallel_size,
        "EP": cluster.expert_model_parallel_size,
        "DP": replicas or cluster.world_size // dense_group(cluster),
    }
    shown = " ".join(
        f"{name}{size}" for name, size in sizes.items() if size and (size > 1 or name in ("TP", "PP", "DP"))
    )
    return shown + (" on gloo ranks" if replicas else "")
