#!/usr/bin/env python3
"""What only a GPU can show, in parts of under ten minutes each; none needs a network.

    python3 benchmarks/gpu/run.py setup               # whether the packages are there; docs/gpu.md installs them
    python3 benchmarks/gpu/run.py parity              # exactness on CUDA and NCCL, and keep ratio 1.0 bit for bit
    python3 benchmarks/gpu/run.py step_time           # dense against sparse: conv, speed-up, peak memory
    python3 benchmarks/gpu/run.py fp8                 # Transformer Engine's FP8 recipes
    python3 benchmarks/gpu/run.py graphs              # CUDA graphs in dense steps beside sparse ones without
    python3 benchmarks/gpu/run.py learning            # the learning experiment in its larger form
    python3 benchmarks/gpu/run.py report              # tables into docs/gpu.md, raw figures into docs/gpu/
    python3 benchmarks/gpu/run.py PART --cpu-rehearsal   # the same code in small, without a GPU; proves no figure

Each part writes OUT/PART.json after every measurement (aside, then renamed), and begins no measurement that would not
end within ``--budget-seconds``. What cannot run says why and is listed as skipped. Exit code 0: all that ran holds; 1:
something does not hold or cannot start.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "setup": "packages",
    "parity": "parity",
    "step_time": "step_time",
    "fp8": "fp8",
    "graphs": "graphs",
    "learning": "learning",
    "report": "report",
}
ON_ONE_RANK = ("parity", "step_time", "fp8", "graphs")  # Megatron is set up before they are imported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    out = os.environ.get("OUT") or ROOT / "out" / "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--cpu-rehearsal", action="store_true", help="try the code in small, without a GPU")
    parser.add_argument("--budget-seconds", type=float, default=540, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(out), help="results; default: $OUT, else out/gpu")
    parser.add_argument("--commit", default=os.environ.get("REGATE_COMMIT"), help="where the tree comes without .git")
    parser.add_argument("--only", metavar="TEXT", help="only measurements whose name contains this")
    parser.add_argument("--config", type=Path, help="learning: another configuration")
    parser.add_argument("--experiment", default="", metavar="FLAGS", help="learning: passed on to the experiment")
    return parser.parse_args(argv)


def main() -> int:
    """Run one part; returns the exit code."""
    options = parse()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    from benchmarks.gpu import machine
    from regate_megatron.errors import one_line_refusals

    name = f"benchmarks.gpu.{PARTS[options.part]}"
    with one_line_refusals():
        if options.part not in ON_ONE_RANK:
            return importlib.import_module(name).run(options)
        with machine.one_rank(options) as device:
            return importlib.import_module(name).run(options, device)


if __name__ == "__main__":
    sys.exit(main())
