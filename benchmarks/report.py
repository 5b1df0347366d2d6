"""All figures in one table: for a terminal, and as markdown between the markers of docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_FORMATS: dict[str, Callable[[float], str]] = {
    "ratio": lambda value: f"{value:.3f}" if value < 10 else f"{value:.1f}",
    "percent": lambda value: f"{value:.2%}",
    "ms": lambda value: f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms",
    "s": lambda value: f"{value:.2f} s",
    "MB": lambda value: f"{value:.1f} MB",
    "count": lambda value: f"{value:,.0f}",
}
_HEAD = ("part", "setting", "figure", "median (quartiles)", "rounds", "goal", "beside it")


def cells(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One tuple of texts per figure."""
    rows = []
    for part in results:
        for line in part["figures"]:
            form = _FORMATS[line["unit"]]
            value = form(line["median"])
            if "quartiles" in line:
                value += f" ({' to '.join(form(end) for end in line['quartiles'])})"
            rounds = str(line["rounds"]) if "rounds" in line else ""
            name = part["part"].replace("_", " ")
            rows.append((name, line["setting"], line["what"], value, rounds, line["goal"], line["beside"]))
    return rows


def text_table(results: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal; what stands beside a figure goes below it."""
    rows = [row[:-1] for row in [_HEAD, *cells(results)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    beside = ["", *(row[-1] for row in cells(results))]
    return "\n".join(line + (f"\n      {text}" if text else "") for line, text in zip(lines, beside, strict=True))


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """The table for a page."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    before = ""
    for part, *others in cells(results):
        lines.append("| " + " | ".join([part if part != before else "", *others]) + " |")
        before = part
    return "\n".join(lines)


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """The step-time part alone, a row per setting."""
    head = ("model", "rows", "keep ratio", "dense layers", "decoder work", "decoder time", "conv (quartiles)", "step")
    lines = ["| " + " | ".join((*head, "planning")) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        low, high = row["conv"]["quartiles"]
        texts = (
            row["model"],
            f"{row['rows']} x {row['length']}",
            f"{row['keep_ratio']:g}",
            f"{row['dense_layers']}",
            f"{row['decoder_work_share']:.1%}",
            f"{row['decoder_time_share']['median']:.1%}",
            f"{row['conv']['median']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['speedup']['median']:.2f} times as fast",
            f"{row['planning_share']['median']:.2%}",
        )
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def visual_table(rows: Sequence[dict[str, Any]]) -> str:
    """The part on visual positions alone, a row per setting."""
    head = ("rows", "targets", "visual", "decoder work", "decoder time", "conv", "step", "cycle", "tower", "saved")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        low, high = row["speedup"]["quartiles"]
        texts = (
            f"{row['rows']}, {row['length']}",
            f"{row['keep_ratio']:g}",
            f"{row['visual_keep_ratio']:g}",
            f"{row['decoder_work_share']:.1%}",
            f"{row['decoder_time_share']['median']:.1%}",
            f"{row['conv']['median']:.2f}",
            f"{row['speedup']['median']:.2f} times as fast ({low:.2f} to {high:.2f})",
            f"{row['cycle_speedup']['median']:.2f}",
            f"{row['tower_work_share_sparse']:.0%} ({row['tower_work_share_sparse_frozen']:.0%})",
            f"{row['saved_share']:.0%}",
        )
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def dealt_table(rows: Sequence[dict[str, Any]]) -> str:
    """Budgets on real ranks, a row per layout and budget."""
    head = ("layout", "budget", "slowest rank, of dense", "its work", "conv", "max/mean", "planning", "moving rows")
    lines = ["| " + " | ".join((*head, "messages")) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        if row["budget"] == "dense":
            continue
        low, high = row["slowest_share"]["quartiles"]
        texts = (
            row["layout"],
            f"`{row['budget']}`",
            f"{row['slowest_share']['median']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['work_share']['median']:.1%}",
            f"{row['conv']['median']:.2f}",
            f"{row['max_mean']['median']:.3f}",
            f"{row['planning_share']['median']:.1%}",
            f"{row['moving_share']['median']:.1%}",
            f"{row['messages']}",
        )
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def visual_fragments(part: dict[str, Any]) -> dict[str, str]:
    """What the page on visual positions shows of its part."""
    names = [row["visual_score"] + (" beside targets" if row["keep_ratio"] < 1 else "") for row in part["planning"]]
    milliseconds = [f"{row['ms']['median']:.0f}" for row in part["planning"]]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(milliseconds)} |"]
    return {"bench-visual": visual_table(part["rows"]), "bench-visual-planning": "\n".join(lines)}


def machine_line(results: dict[str, Any]) -> str:
    """What it ran on, in a sentence."""
    one = results["machine"]
    commit = f", commit {results['commit']}" if results.get("commit") else ""
    return (
        f"{one['cpu']}, one thread of {one['cores']} cores, {one['precision']}; Python {one['python']}, torch"
        f" {one['torch']}, megatron-core {one['megatron_core']}, regate_megatron {one['regate_megatron']}{commit};"
        f" {results['seconds']:.0f} s in all."
    )


def fragments(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the markers of a page, by their name."""
    head, interval = results["headline"], results["headline_interval"]["conv"]
    of = results["headline_setting"]
    parts = {part["part"]: part for part in results["parts"]}
    more = visual_fragments(parts["visual"]) if "visual" in parts else {}
    more |= {"bench-dealt": dealt_table(parts["dealt"]["rows"])} if "dealt" in parts else {}
    return more | {
        "bench-machine": machine_line(results),
        "bench-table": markdown_table(results["parts"]),
        "bench-steps": step_table(parts["step_time"]["rows"]),
        "bench-headline": (
            f"{of['model']}, {of['length']} positions, keep ratio {of['keep_ratio']:g}, {of['dense_layers']} dense"
            f" layer: **conv {head['conv']:.3f}** (95 % interval {interval[0]:.3f} to {interval[1]:.3f}), planning"
            f" {head['planning_share']:.2%} of the step, {head['kept_share']:.1%} of the targets kept. A sparse step,"
            f" without teacher and optimizer: **{head['speedup']:.2f} times as fast**. On text the teacher costs up to"
            " a third of a dense step for samples it has not seen: a first epoch can be slower than dense. `estimate`"
            " says how much."
        ),
    }


def write_between_markers(page: Path, texts: dict[str, str]) -> list[str]:
    """Fill every ``<!-- name -->…<!-- /name -->`` of a page anew; returns the names it has."""
    text, found = page.read_text(), []
    for name, content in texts.items():
        block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
        found += [name] * bool(count)
    page.write_text(text)
    return found
