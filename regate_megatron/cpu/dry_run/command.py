"""The dry run: check the line, run it small, say what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regate_megatron import compat
from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig
from regate_megatron.cpu import emulation, launch
from regate_megatron.cpu.dry_run import cluster as checks
from regate_megatron.cpu.dry_run.flags import small_flags, small_values
from regate_megatron.cpu.dry_run.line import LaunchLine, parse_line
from regate_megatron.cpu.dry_run.shrink import (
    TRAIN_STEPS,
    data_parallel_size,
    dense_group,
    least_ranks,
    smaller_layouts,
    weights_gb,
)
from regate_megatron.cpu.emulation import forked
from regate_megatron.cpu.emulation.arguments import options_of_megatron, without
from regate_megatron.errors import ReGateError, one_line_refusals, refuse

_GB_PER_RANK = 0.3  # a fork of this process, its small model, and the queue it forks to save checkpoints: measured 0.2
_SECONDS_TO_START, _SECONDS_PER_RANK = 15.0, 8.0  # measured: 32 ranks on two cores 143 s
_NOT_CHECKED = "GPU kernels and memory, NCCL, FP8 arithmetic, speed, the values of your data"


def main(words: list[str], *, sample: Callable[[Path, Any, ReGateConfig], None] | None = None) -> None:
    """Run the command; exits with 1 and one line per refusal when the line would not run.

    Args:
        sample: takes the trace of rows as long as the line says, Megatron's namespace of the line and the settings.
    """
    with one_line_refusals():
        line = parse_line(words)
        sys.dont_write_bytecode = True  # nothing is written but to the temporary folder
        emulation.set_environment()
        launch.use_checkout_of(line.script)
        compat.require_megatron()
        emulation.install()
        cluster, config = checks.check(line)
        asked, (line, cluster, replicas) = cluster, _fitting(line, cluster)
        num_ranks = dense_group(cluster) * replicas
        with tempfile.TemporaryDirectory(prefix="regate-dry-run-") as name:
            folder = Path(name)
            emulation.compile_helpers(folder)
            own = {"replicas": replicas, "folder": folder, "keeps_lengths": sample is not None}
            flags, said = small_flags(line, cluster, config, **own)
            print(f"[dry run] Megatron's flags pass at {asked.world_size} ranks: {_layout(asked)}")
            if cluster is not asked:
                said.insert(0, f"{_layout(asked)} -> {_layout(cluster)}: the same kinds, as far as this machine goes")
                print(f"[dry run] too large for here; in its place {_layout(cluster)}, the same kinds of parallelism")
            print(
                f"[dry run] now {_layout(cluster, replicas)}: {num_ranks} ranks on {os.cpu_count()} cores, "
                f"about {_seconds(num_ranks):.0f} s; the script parses its own flags there",
                flush=True,
            )
            output = _run(line, flags, num_ranks, folder)
            if sample is not None:
                sample(folder / "trace", asked, config)
        _report(line, asked, cluster, config, replicas, said, output)


def _seconds(num_ranks: int) -> float:
    """How long so many ranks take here, roughly."""
    return _SECONDS_TO_START + _SECONDS_PER_RANK * num_ranks / min(os.cpu_count() or 1, num_ranks)


def _fitting(line: LaunchLine, cluster: Any) -> tuple[LaunchLine, Any, int]:
    """The line, its namespace and the data-parallel replicas to run here: as asked for, or where that is too large the
    largest layout of the same kinds.

    Raises:
        ReGateError: not even the smallest fits.
    """
    limit = _most_ranks(line, cluster)
    replicas = data_parallel_size(cluster, limit)
    if replicas is not None:
        return line, cluster, replicas
    for sizes, num_ranks in smaller_layouts(cluster):
        flags = without(line.flags, sizes, options_of_megatron())
        flags += [str(word) for size in sizes.items() for word in size]
        smaller = dataclasses.replace(line, flags=flags, num_ranks=num_ranks)
        with contextlib.suppress(ReGateError):
            return _fitting(smaller, checks.validate(smaller))
    raise refuse(
        "dry-run",
        given=f"a layout of at least {least_ranks(cluster)} ranks and room for {limit} here",
        allowed=f"--max-ranks, {_GB_PER_RANK} GB of free memory per rank ({_available_gb():.1f} GB), and --timeout",
        change="these, or try a smaller tensor or pipeline size here",
    )


def _most_ranks(line: LaunchLine, cluster: Any) -> int:
    """How many ranks memory, time and the command leave room for."""
    gb = _GB_PER_RANK + weights_gb(small_values(line, cluster), cluster)
    cores = os.cpu_count() or 1
    in_time = int((line.timeout_s - _SECONDS_TO_START) * cores / _SECONDS_PER_RANK)
    return min(int(min(_available_gb() / gb, 1e9)), max(in_time, 1), line.max_ranks or 10**9)


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
        launch.run_script([line.script, *flags], on_cpu=True)

    log, env = folder / "log", {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
    ended = forked.run(num_ranks, work, log=log, timeout_s=line.timeout_s, env=env)
    output = "\n".join(Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(num_ranks))
    if any(ended.codes):
        raise _failed(line, _reason(output, ended, line.timeout_s), output)
    return output


def _failed(line: LaunchLine, reason: str, output: str) -> Exception:
    kept = Path(tempfile.gettempdir()) / f"regate-dry-run-{os.getpid()}.log"
    kept.write_text(output)
    if reason.startswith("regate: "):  # says all of it
        print(f"[dry run] stopped by a refusal; all output is in {kept}", flush=True)
        return ReGateError(reason)
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
    line: LaunchLine,
    asked: Any,
    cluster: Any,
    config: ReGateConfig | None,
    replicas: int,
    said: list[str],
    output: str,
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
        f"line        {Path(line.script).name} at {asked.world_size} ranks: {_layout(asked)}",
        f"checked     Megatron accepts the flags at {asked.world_size} ranks ({compat.versions()})",
        f"            {_layout(cluster, replicas)} ran {TRAIN_STEPS} steps: {', '.join(done)}",
    ]
    if attached:
        last = ", the last:" if sparse else ": the settings leave nothing out"
        lines.append(f"            ReGATE on {attached[0]}; {len(sparse)} sparse steps{last}")
        lines += [f"            {sparse[-1].split('| ', 1)[1].split(' | per step')[0]}"] if sparse else []
    lines += [f"{'shrunk' if index == 0 else '':12}{one}" for index, one in enumerate(said)]
    lines.append(f"not checked {_NOT_CHECKED}")
    print("\n".join(f"[dry run] {one}" for one in lines))
    if config is not None and config.teacher_load != STUDENT_AS_TEACHER and config.needs_teacher:
        print(f"[dry run]             the teacher {config.teacher_load} was not run: the small student took its place")
        if not Path(config.teacher_load).exists():
            print(f"[dry run]             nothing is at {config.teacher_load} here: see that every node has it")
    for one in _worth_knowing(line, cluster, config):
        print(f"[dry run] look at     {one}")
    print("[dry run] ok")


def _worth_knowing(line: LaunchLine, cluster: Any, config: ReGateConfig | None) -> list[str]:
    """What passes, and is most likely not meant."""
    ours = [word.partition("=")[0] for word in line.flags if word.startswith("--regate")]
    if config is None:
        return [f"ReGATE is off: {', '.join(ours)} given without --regate"] if ours else ["ReGATE is off: no --regate"]
    found = [f"{', '.join(config.idle)} not used: nothing reads it"] if config.idle else []
    if line.is_bare:
        found.append(f"{line.script} knows no --regate flags by itself: put -m regate_megatron before it, or patch it")
    if config.ranks_targets and not cluster.calculate_per_token_loss:
        found.append("--calculate-per-token-loss is off: rows keep different numbers of targets; add it")
    return found


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
