"""Part learning: the learning experiment of examples/experiments in its larger form, by its own command.

Runs ``examples/experiments/run.py --config configs/h200.toml`` in a process of its own with the time that is left. The
experiment keeps finished runs and goes on where it was, so that a part which ran out of time is simply called again;
in any case its report of what is there is written, and kept in the result. What holds here is only that it ends by
itself with exit code 0; the experiment says what it compares. ``--experiment "--arms dense,regate --seeds 1"`` passes
flags on. A rehearsal takes cpu.toml and those two arms.
"""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.results import Results

FOLDER = machine.ROOT / "examples" / "experiments"
OUT = machine.ROOT / "out" / "experiments"  # the experiment's own
REPORT_SECONDS = 60
KEPT = ("summary.md", "results.csv")


def run(options: Any) -> int:
    """The part; returns the exit code."""
    config = options.config or FOLDER / "configs" / ("cpu.toml" if options.cpu_rehearsal else "h200.toml")
    flags = shlex.split(options.experiment or ("--arms dense,regate --seeds 1" if options.cpu_rehearsal else ""))
    results = Results(options, config=config.name, flags=flags)
    ok, reason = (True, "") if options.cpu_rehearsal else machine.check_gpu()
    if not (FOLDER / "run.py").is_file():
        results.skip("experiment", "this checkout has no examples/experiments/run.py")
    elif not config.is_file():
        results.skip("experiment", f"no configuration {config.name}; see --config")
    elif not ok:
        results.skip("experiment", reason)
    else:
        results.measure("experiment", 1, functools.partial(experiment, config, flags, options, results.seconds_left()))
    return results.finish()


def experiment(config: Path, flags: list[str], options: Any, seconds: float) -> dict[str, Any]:
    """Run it and end it with all its children when the time is up; then have it report what is there."""
    command = [sys.executable, str(FOLDER / "run.py"), "--config", str(config), *flags]
    log = options.out / "learning.log"
    begin, report_seconds = time.monotonic(), min(REPORT_SECONDS, seconds / 4)
    code = finish_within(command, log, seconds - report_seconds)
    if code is None:
        finish_within([*command, "--report-only"], log.with_name("learning-report.log"), report_seconds)
    return {
        "holds": None if code is None else code == 0,
        "exit_code": code,
        "ended": "at the end of its time: call again to go on" if code is None else "by itself",
        "seconds_run": round(time.monotonic() - begin, 1),
        "said_last": log.read_text(errors="replace").splitlines()[-30:],
        "report": {name: (OUT / name).read_text() for name in KEPT if (OUT / name).is_file()},
    }


def finish_within(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code of a command whose output goes into ``log``; None where it had to be ended, with its children."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
