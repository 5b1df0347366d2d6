"""Clocks, medians and files: what every part of the benchmark shares. No Megatron, and torch only inside functions.

A speed is never given alone: it is a ratio of two things that ran side by side, in one process, in turn, many times,
and what is printed is the median of the ratios within each round, with the quartiles. The *interval* beside a headline
is the 95 % confidence interval of that median (order statistics: no assumption on how times are distributed).

Times are CPU seconds of this process, on one thread: the same on a busy machine, where wall clock would measure the
neighbours. Caches and memory are shared all the same, so quiet machines give narrower quartiles.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "bench"
_SIGMAS = 1.96  # 95 %


@dataclass
class Clock:
    """CPU and wall-clock seconds since the start of something."""

    cpu: float = field(default_factory=time.process_time)
    wall: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> Clock:
        """Since then."""
        return Clock(time.process_time() - self.cpu, time.perf_counter() - self.wall)

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.cpu - other.cpu, self.wall - other.wall)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """How long ``work()`` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, the 95 % interval of the median, and how many there are."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return {
        "median": _round(middle),
        "quartiles": [_round(low), _round(high)],
        "interval": [_round(value) for value in median_interval(values)],
        "rounds": len(values),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median: the order statistics that a fair coin would leave outside 5 %."""
    ordered, count = sorted(values), len(values)
    below = max(0, math.floor(count / 2 - _SIGMAS * math.sqrt(count) / 2))
    return ordered[below], ordered[count - 1 - below]


def rounds_within(rounds: int, seconds: float, *, name: str) -> Iterator[int]:
    """Numbers from 0 with a progress bar: ``rounds`` of them and one to warm up, none begun after ``seconds``.

    The first round, number 0, touches memory for the first time: it is run and thrown away.
    """
    from tqdm import tqdm

    begin = time.perf_counter()
    for index in tqdm(range(rounds + 1), desc=name, unit="round", disable=None):
        if index > 3 and time.perf_counter() - begin > seconds:
            break
        yield index


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no names of hosts or people."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((row.split(":")[1].strip() for row in info.read_text().splitlines() if "model name" in row), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads_used": 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "regate_megatron": _own_version(),
        "precision": "float32",
        "load": round(os.getloadavg()[0], 1),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Aside first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".incomplete")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def figure(
    setting: str, what: str, measured: dict[str, Any] | float, unit: str = "ratio", *, goal: str = "", beside: str = ""
) -> dict[str, Any]:
    """One line of the table.

    Args:
        setting: on what.
        what: the quantity.
        measured: from :func:`spread`, or a plain number that does not vary.
        unit: "ratio", "percent", "ms", "s", "MB" or "count".
        goal: what it should be.
        beside: figures that belong to it, as text.
    """
    value = measured if isinstance(measured, dict) else {"median": measured}
    return {"setting": setting, "what": what, **value, "unit": unit, "goal": goal, "beside": beside}


def run_part(
    name: str,
    document: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
) -> dict[str, Any]:
    """The command line of one part: measure, write ``NAME.json``, print its table.

    Args:
        document: the part's text, for ``--help``; what it counts.
        measure: gives ``figures`` (see :func:`figure`) and whatever else is to be kept.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: a smoke test, no measurement")
    parser.add_argument("--seconds", type=float, default=None, help="about how long to measure")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where NAME.json goes")
    options = parser.parse_args()
    start = Clock()
    on = machine()
    print(f"{name}: {on}")
    found = measure(options)
    results = {"part": name, "counted": document.strip(), "machine": on, "quick": options.quick, **found}
    results["seconds"] = round(start.elapsed().wall, 1)
    write_json(options.out / f"{name}.json", results)
    from benchmarks.report import text_table

    print(text_table([results]))
    return results


def _own_version() -> str:
    rows = (ROOT / "pyproject.toml").read_text().splitlines()
    return next(row.split('"')[1] for row in rows if row.startswith("version"))


def _round(value: float) -> float:
    return float(f"{value:.5g}")
