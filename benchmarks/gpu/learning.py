"""Part learning: the learning experiment of examples/experiments in its larger form, by its own command.

Runs ``examples/experiments/run.py --config CONFIG`` in a process of its own with the time that is left, and keeps the
end of what it said and the JSON files it wrote. The experiment itself says what it compares. What holds here is only
that it ends by itself with exit code 0.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.results import Results

EXPERIMENT = machine.ROOT / "examples" / "experiments" / "run.py"
CONFIGS = EXPERIMENT.parent / "configs"
MOST_BYTES = 1 << 20  # of one JSON file that is kept


def run(options: Any) -> int:
    """The part; returns the exit code."""
    config = options.config or next(iter(sorted(CONFIGS.glob("*gpu*"))), None)
    results = Results(options, config=config.name if config else None)
    ok, reason = (True, "") if options.cpu_rehearsal else machine.check_gpu()
    if not EXPERIMENT.is_file():
        results.skip("experiment", "this checkout has no examples/experiments/run.py")
    elif config is None or not config.is_file():
        results.skip("experiment", "no configuration for a GPU in examples/experiments/configs; see --config")
    elif not ok:
        results.skip("experiment", reason)
    else:
        results.measure("experiment", 5, functools.partial(experiment, config, options, results.seconds_left() - 5))
    return results.finish()


def experiment(config: Path, options: Any, seconds: float) -> dict[str, Any]:
    """Run it, and end it with all its children when the time is up."""
    start, begin = time.time(), time.monotonic()
    command = [sys.executable, str(EXPERIMENT), "--config", str(config)]
    log = options.out / "learning.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return {
        "holds": code == 0,
        "exit_code": code,
        "ended": "by itself" if code is not None else "at the end of its time",
        "seconds_run": round(time.monotonic() - begin, 1),
        "said_last": log.read_text(errors="replace").splitlines()[-40:],
        "files": written_since(start),
    }


def written_since(start: float) -> dict[str, Any]:
    """JSON files under out/ that are newer, by their path; not those of this benchmark."""
    found = {}
    for path in sorted((machine.ROOT / "out").glob("experiments/**/*.json")):
        if path.stat().st_mtime >= start and path.stat().st_size <= MOST_BYTES:
            found[str(path.relative_to(machine.ROOT))] = json.loads(path.read_text())
    return found
