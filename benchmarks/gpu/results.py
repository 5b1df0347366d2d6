"""What a part leaves: one JSON file, complete after every measurement, and the time it may take.

``{"part", "status", "machine", "measurements": [...], "skipped": [...]}``; a measurement has a ``name``, says under
``holds`` whether its claim is true (None where it only measures), and has its figures beside that.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from regate_megatron.errors import ReGateError


class Results:
    """The results of one part.

    Args:
        options: the command line of run.py.
        settings: what holds for the whole part, written at its head.
    """

    def __init__(self, options: Any, **settings: Any) -> None:
        self.path = options.out / f"{options.part}.json"
        self.only, self.budget = options.only, options.budget_seconds
        self._start = time.monotonic()
        self.data: dict[str, Any] = {
            "part": options.part,
            "status": "running",
            "machine": machine.describe(options),
            "settings": settings,
            "measurements": [],
            "skipped": [],
        }
        self.write()

    def seconds_left(self) -> float:
        """Seconds until nothing new may begin, counted from the start of the part."""
        return self.budget - (time.monotonic() - self._start)

    def measure(self, name: str, needs_seconds: float, function: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Run one measurement and keep what it returns; a fault is kept as one that does not hold.

        Args:
            needs_seconds: a guess; the measurement is skipped when less is left.
        """
        if self.only and self.only not in name:
            return None
        if self.seconds_left() < needs_seconds:
            self.skip(name, f"{max(0, self.seconds_left()):.0f} s left, about {needs_seconds:.0f} needed")
            return None
        start = time.monotonic()
        try:
            found = {"name": name, "holds": None, **function()}
        except Exception as fault:
            if not isinstance(fault, ReGateError):
                traceback.print_exc()
            found = {"name": name, "holds": False, "fault": f"{type(fault).__name__}: {fault}"[:2000]}
        found["seconds"] = round(time.monotonic() - start, 1)
        self.data["measurements"].append(found)
        print(f"{ {True: 'holds', False: 'FAILS', None: 'found'}[found['holds']] }: {brief(found)}", flush=True)
        self.write()
        return found

    def skip(self, name: str, reason: str) -> None:
        """Say that a measurement was not taken."""
        if self.only and self.only not in name:
            return
        self.data["skipped"].append({"name": name, "reason": reason})
        print(f"skipped: {name}: {reason}", flush=True)
        self.write()

    def finish(self) -> int:
        """Write the last state; returns the exit code."""
        faults = [one["name"] for one in self.data["measurements"] if one["holds"] is False]
        self.data["status"] = "complete" if not self.data["skipped"] else "complete but for what was skipped"
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
        self.write()
        num, skipped = len(self.data["measurements"]), len(self.data["skipped"])
        print(f"{num} measurements, {len(faults)} that do not hold, {skipped} skipped; wrote {self.path}", flush=True)
        return int(bool(faults) or not num)

    def write(self) -> None:
        """Aside first, then renamed."""
        write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` aside, then rename it into its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".incomplete")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(aside, path)


def brief(found: dict[str, Any]) -> str:
    """A measurement's name and its plain figures, in one line."""
    figures = {key: value for key, value in found.items() if key not in ("name", "holds", "seconds")}
    texts = [
        f"{key} {_short(value)}"
        for key, value in figures.items()
        if key not in ("setting", "raw_s", "curves", "said_last", "report")
    ]
    return f"{found['name']} ({found['seconds']} s): " + ", ".join(texts)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3g} ({value['quartiles'][0]:.3g}–{value['quartiles'][1]:.3g})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(one)}" for key, one in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and number of values."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, 6), "quartiles": [round(low, 6), round(high, 6)], "num": len(values)}
