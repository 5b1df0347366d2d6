"""Part report: tables into docs/gpu.md, and the figures they come from into docs/gpu/.

A rehearsal's results never go into the documentation: with ``--cpu-rehearsal`` the tables are printed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.results import write_json
from regate_megatron.errors import refuse

PAGE = machine.ROOT / "docs" / "gpu.md"
PARTS = ("setup", "parity", "step_time", "fp8", "graphs", "learning")
VERDICT = {True: "holds", False: "**does not hold**", None: "measured"}


def run(options: Any) -> int:
    """The part; returns the exit code.

    Raises:
        ReGateError: there are no results, or they come from a rehearsal.
    """
    found = read(options.out)
    if not found:
        raise refuse(
            "report", given=f"no results in {options.out}", allowed="what the other parts wrote", change="--out"
        )
    tables = "\n\n".join(section(one) for one in found)
    if options.cpu_rehearsal:
        print(tables)
        return 0
    rehearsed = [one["part"] for one in found if one["machine"]["rehearsal"]]
    if rehearsed:
        given = f"results of a rehearsal: {', '.join(rehearsed)}"
        raise refuse("report", given=given, allowed="results from a GPU", change="--out, or add --cpu-rehearsal")
    PAGE.write_text(with_results(PAGE.read_text(), tables))
    for one in found:
        write_json(PAGE.with_suffix("") / f"{one['part']}.json", one)
    print(f"wrote {PAGE.relative_to(machine.ROOT)} and {len(found)} files beside it")
    return 0


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of all parts that are there, in order."""
    paths = [folder / f"{part}.json" for part in PARTS]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def with_results(page: str, tables: str) -> str:
    """The page with what stands between its marks replaced."""
    block = f"<!-- results -->\n{tables}\n<!-- /results -->"
    return re.sub(r"<!-- results -->.*?<!-- /results -->", lambda _: block, page, flags=re.S)


def section(results: dict[str, Any]) -> str:
    """One part: where and when, its table, what was skipped."""
    lines = [f"### {results['part']}", "", _machine(results["machine"]), ""]
    table = {"step_time": _steps, "parity": _parity}.get(results["part"], _plain)
    lines += table(results["measurements"])
    lines += [""] * bool(results["skipped"])
    lines += [f"- skipped: {one['name']} ({one['reason']})" for one in results["skipped"]]
    return "\n".join(lines)


def _machine(about: dict[str, Any]) -> str:
    names = ("gpu", "driver", "cuda", "nccl", "torch", "megatron-core", "transformer-engine", "python", "commit")
    what = [f"{name} {about[name]}" for name in names if about.get(name)]
    return ("Rehearsal on a CPU. " if about["rehearsal"] else "") + ", ".join(what) + "."


def _steps(measurements: list[dict[str, Any]]) -> list[str]:
    lines = ["| setting | work | time | conv (quartiles) | step conv | speed-up | planning | TFLOP/s | peak, GiB | |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for one in measurements:
        if "conv" not in one:
            continue
        low, high = one["conv"]["quartiles"]
        cells = [
            one["name"],
            f"{one['decoder_work_share']:.1%}",
            f"{one['decoder_time_share']['median']:.1%}",
            f"{one['conv']['median']:.2f} ({low:.2f}–{high:.2f})",
            f"{one['step_conv']['median']:.2f}",
            f"{one['speedup']['median']:.2f}",
            f"{one['planning_share']['median']:.1%}",
            f"{one['dense_decoder_tflops']['median']:.0f}",
            _peak(one["peak"]),
            VERDICT[one["holds"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rest = [one for one in measurements if "conv" not in one]
    return [*lines, *([""] + _plain(rest) if rest else [])]


def _peak(peak: Any) -> str:
    if not isinstance(peak, dict):
        return "not measured"
    dense, sparse = (peak[f"{arm}_total"] / 2**30 for arm in ("dense", "sparse"))
    return f"{dense:.1f} → {sparse:.1f}"


def _parity(measurements: list[dict[str, Any]]) -> list[str]:
    lines = ["| case | loss error | noise | not hidden | gradient error | noise | |", "|---|---|---|---|---|---|---|"]
    rest = []
    for one in measurements:
        if "error" not in one:
            rest.append(one)
            continue
        by, error, noise = one["judged_by"], one["error"], one["noise"]
        values = [error["losses"][by], noise["losses"][by], one["unhidden"][by]]
        values += [error["gradients"][by], noise["gradients"][by]]
        cells = [f"{one['name']} ({by})", *(f"{value:.1e}" for value in values), VERDICT[one["holds"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *([""] + _plain(rest) if rest else [])]


def _plain(measurements: list[dict[str, Any]]) -> list[str]:
    lines = ["| measurement | seconds | |", "|---|---|---|"]
    for one in measurements:
        verdict = VERDICT[one["holds"]] + (f": {one['fault'].splitlines()[0]}" if "fault" in one else "")
        if "conv" in one:
            verdict += f": conv {one['conv']['median']:.2f}, speed-up {one['speedup']['median']:.2f}"
        if "same_again" in one:
            verdict = ", ".join(f"{name} {one[name]['median']:.3f}" for name in ("same_again", "against_short"))
        lines.append(f"| {one['name']} | {one['seconds']} | {verdict.replace('|', '/')} |")
    return lines
