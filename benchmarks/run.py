#!/usr/bin/env python3
"""All benchmarks, each part in a process of its own, one after the other; `make bench`.

    python benchmarks/run.py                     # under 15 minutes on two cores; out/bench/results.json, bench.png
    python benchmarks/run.py --only memory teacher    # these parts anew, the others as they were
    python benchmarks/run.py --resume            # only what is missing
    python benchmarks/run.py --write-docs        # measure nothing: fill docs/benchmarks.md and README from out/bench
    python benchmarks/run.py --quick --out DIR   # a smoke test; its figures mean nothing

Every part prints what it counts with ``--help`` (``python -m benchmarks.NAME --help``) and leaves ``NAME.json``; here
they become one table, one ``results.json`` and one picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import OUT, write_json  # noqa: E402
from benchmarks.report import fragments, machine_line, text_table, write_between_markers  # noqa: E402

PARTS = ("step_time", "visual", "alternatives", "planning", "slowest_rank", "dealt", "teacher", "memory")
HEADLINE_PART = "step_time"
_LIMIT_S = 900  # of one part; a hung one is killed


def run_part(name: str, options: argparse.Namespace) -> None:
    """Measure one part in a process of its own.

    Raises:
        SystemExit: it failed; what it printed says why.
    """
    python = options.deepspeed_python if name == "alternatives" and options.deepspeed_python else sys.executable
    command = [python, "-m", f"benchmarks.{name}", "--out", str(options.out)]
    if options.quick:
        command.append("--quick")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, cwd=ROOT, env=env, timeout=_LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"no end after {_LIMIT_S} s"
    if code:
        sys.exit(f"benchmarks.{name} failed ({code}); the parts before it are kept: --resume goes on")


def collect(folder: Path) -> dict[str, Any]:
    """The parts that are there as one result: the headline's part first."""
    parts = [json.loads((folder / f"{name}.json").read_text()) for name in PARTS if (folder / f"{name}.json").is_file()]
    head = next((part for part in parts if part["part"] == HEADLINE_PART), {})
    keys = ("headline", "headline_setting", "headline_interval")
    results = {key: head[key] for key in keys if key in head}
    for part in parts:
        results |= {name: part[name] for name in ("visual", "dealt") if name in part}
    results |= {"machine": parts[0]["machine"], "commit": commit()}
    results["seconds"] = round(sum(part["seconds"] for part in parts), 1)
    results["quick"] = any(part["quick"] for part in parts)
    return results | {"parts": parts}


def commit() -> str:
    """The commit of this checkout, and whether files differ from it; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_docs(results: dict[str, Any], picture: Path) -> None:
    """Fill the marked blocks of the pages, and put the picture beside them.

    Raises:
        SystemExit: the results are of a smoke test or have no headline.
    """
    if results["quick"] or "headline" not in results:
        sys.exit("these results are not to be published: measure all parts without --quick first")
    texts = fragments(results)
    if picture.is_file():
        (ROOT / "docs" / "benchmarks.png").write_bytes(picture.read_bytes())
        texts["bench-picture"] = "![all parts](benchmarks.png)"
    pages = [ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "visual", "balance")]
    for page in (*pages, ROOT / "README.md"):
        print(f"{page.relative_to(ROOT)}: {', '.join(write_between_markers(page, texts)) or 'no markers'}")


def main(argv: list[str] | None = None) -> None:
    """Run, collect, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are measured already")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
    parser.add_argument("--write-docs", action="store_true", help="publish what is measured")
    parser.add_argument("--deepspeed-python", metavar="FILE", help="a Python that has DeepSpeed too, for alternatives")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    file, picture = options.out / "results.json", options.out / "bench.png"
    if options.write_docs:
        if not file.is_file():
            sys.exit(f"nothing to publish: no {file.name} yet; run without --write-docs first")
        return write_docs(json.loads(file.read_text()), picture)
    for name in options.only:
        if not (options.resume and (options.out / f"{name}.json").is_file()):
            run_part(name, options)
    results = collect(options.out)
    write_json(file, results)
    from benchmarks.plots import draw

    draw(results["parts"], picture)
    print(f"\n{text_table(results['parts'])}\n\n{machine_line(results)}")
    if "headline" in results:
        print("headline: " + ", ".join(f"{name} {value:.4f}" for name, value in results["headline"].items()))
    print(f"wrote {file} and {picture.name}")


if __name__ == "__main__":
    main()
