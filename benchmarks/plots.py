"""One picture of all parts: what is measured stands on the left axis of each panel, dense or 1 is a dotted line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS, OTHER = "#0b6e4f", "#b0b7bf"


def draw(parts: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with a panel per part."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in parts if part["part"] in _PANELS]
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    for axis, part in zip(axes.flat, parts, strict=False):
        _PANELS[part["part"]](axis, part)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(parts) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _step_time(axis: Any, part: dict[str, Any]) -> None:
    for kind, marker in (("GPT", "o"), ("LLaVA", "s")):
        rows = [row for row in part["rows"] if row["model"] == kind]
        work = [row["decoder_work_share"] for row in rows]
        time = [row["decoder_time_share"]["median"] for row in rows]
        ends = [row["decoder_time_share"]["quartiles"] for row in rows]
        error = [[abs(one - end[side]) for one, end in zip(time, ends, strict=True)] for side in (0, 1)]
        axis.errorbar(work, time, error, fmt=marker, color=OURS, label=kind, alpha=0.8)
    axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
    axis.set(title="decoder time against work", xlabel="work left, of dense", ylabel="time left, of dense")
    axis.legend(frameon=False)


def _alternatives(axis: Any, part: dict[str, Any]) -> None:
    rows = part["rows"][1:]
    shares = [row["step_time_share"] for row in rows]
    _bars(axis, [row["way"] for row in rows], shares, ["ours" in row["way"] for row in rows])
    axis.axvline(1, ls=":", color="black", lw=1)
    axis.set(title="same kept tokens, other ways", xlabel="step time, of dense")


def _planning(axis: Any, part: dict[str, Any]) -> None:
    for budget in dict.fromkeys(row["budget"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["budget"] == budget]
        axis.plot([row["ranks"] for row in rows], [row["sparse_ms"]["median"] for row in rows], "o-", label=budget)
    axis.set(title=f"planning with {part['targets']:.0e} targets", xlabel="data-parallel ranks", ylabel="ms per step")
    axis.set(xscale="log", ylim=(0, None))
    ranks = sorted({row["ranks"] for row in part["rows"]})
    axis.set_xticks(ranks, [str(count) for count in ranks])
    axis.minorticks_off()
    axis.legend(frameon=False)


def _dealt(axis: Any, part: dict[str, Any]) -> None:
    rows = [row for row in part["rows"] if row["budget"] != "dense"]
    names = [f"{row['layout']}, {row['budget']}" for row in rows]
    _bars(axis, names, [row["slowest_share"] for row in rows], [row["budget"] == "dealt" for row in rows])
    axis.axvline(1, ls=":", color="black", lw=1)
    axis.set(title="slowest of four real ranks", xlabel="its time, of the dense step's slowest")


def _slowest_rank(axis: Any, part: dict[str, Any]) -> None:
    rows = part["rows"]
    names = [f"{row['mix']}\n{row['budget']}" for row in rows]
    _bars(axis, names, [row["slowest_share"] for row in rows], [True] * len(rows))
    axis.axvline(1, ls=":", color="black", lw=1)
    axis.set(title=f"slowest of {part['ranks']} ranks", xlabel="its time, of the dense step's slowest")


def _teacher(axis: Any, part: dict[str, Any]) -> None:
    rows = part["rows"]
    shares = [row["of_epoch"] for row in rows]
    _bars(axis, [row["way"] for row in rows], shares, [row["way"] != "pad" for row in rows])
    axis.set(title="teacher on video-like rows", xlabel="its time, of the student's epoch")


def _memory(axis: Any, part: dict[str, Any]) -> None:
    rows = sorted(
        (row for row in part["rows"] if "ours" in row["way"] and row["dense_layers"] == 1),
        key=lambda row: row["positions_share"],
    )
    positions = [row["positions_share"] for row in rows] + [1.0]
    axis.plot(positions, [row["saved_share"] for row in rows] + [1.0], "o-", color=OURS, label="ours, 1 dense layer")
    for row in part["rows"]:
        if "ours" not in row["way"]:
            axis.plot(row["positions_share"], row["saved_share"], "x", color="black")
            axis.annotate(row["way"], (row["positions_share"], row["saved_share"]), fontsize=7, ha="right")
    axis.plot([0, 1], [0, 1], ":", color="black", lw=1)
    axis.set(title="saved for backward", xlabel="positions after the dense layers, of dense", ylabel="bytes, of dense")
    axis.legend(frameon=False)


def _bars(axis: Any, names: Sequence[str], measured: Sequence[dict[str, Any]], is_ours: Sequence[bool]) -> None:
    medians = [one["median"] for one in measured]
    error = [[abs(one["median"] - one["quartiles"][side]) for one in measured] for side in (0, 1)]
    axis.barh(range(len(names)), medians, xerr=error, color=[OURS if ours else OTHER for ours in is_ours])
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()


_PANELS = {
    "step_time": _step_time,
    "alternatives": _alternatives,
    "planning": _planning,
    "slowest_rank": _slowest_rank,
    "dealt": _dealt,
    "teacher": _teacher,
    "memory": _memory,
}
