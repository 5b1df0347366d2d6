"""The experiment's pictures: accuracy against targets and time, and all arms side by side."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pictures  # the demo's: colours, and matplotlib set up for files
from pictures import FAINT

TIME = "CPU minutes of training, planning and teacher included"
SPENT = {  # unit, and what it is called
    "targets_processed": (1000, "targets processed, thousands"),
    "compute": (1, "FLOPs of the training steps, in dense steps"),
    "cpu_seconds": (60, TIME),
}
STYLE = pictures.STYLE | {"dense-short": ("#999999", "v")}
OTHERS = [("#009E73", "^"), ("#0072B2", "s"), ("#D55E00", "D"), ("#CC79A7", "P"), ("#E69F00", "X"), ("#56B4E9", "*")]


def over_training(arms: dict[str, list[dict]], named: dict, file: Path, *, first: str) -> None:
    """Mean over seeds with the range, against what `first` counts and against CPU time."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), dpi=150, sharey=True)
    others = [name for name in arms if name not in STYLE]
    style = STYLE | dict(zip(others, itertools.cycle(OTHERS), strict=False))
    for axis, key in zip(axes, (first, "cpu_seconds"), strict=True):
        unit, label = SPENT[key]
        for name, runs in arms.items():
            colour, marker = style[name]
            points = defaultdict(list)
            for run in runs:
                for point in run["curve"]:
                    points[point["iteration"]].append((point[key] / unit, 100 * point["image_word_accuracy"]))
            whole = [np.array(found) for _, found in sorted(points.items()) if len(found) == len(runs)]
            x, y = (np.array([found[:, i].mean() for found in whole]) for i in (0, 1))
            low, high = (np.array([edge(found[:, 1]) for found in whole]) for edge in (np.min, np.max))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            label_text = f"{named[name]['title']} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label_text)
        axis.set_xlabel(label)
        axis.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("held-out accuracy, words that need the picture, %")
    rows = -(-len(arms) // 2)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncol=2, loc=(0.06, 0.035))
    note = (
        "Mean over seeds, shaded from the lowest to the highest. Every evaluation is dense. The learning rate falls to "
        "the end of each run: a point before the end is not what a run of that length would reach."
    )
    figure.text(0.012, 0.012, note, fontsize=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.06 + 0.04 * rows, 1, 1), w_pad=2)
    figure.savefig(file)
    plt.close(figure)


def all_arms(summary: list[dict], file: Path) -> None:
    """One line per arm: every seed's accuracy at the end and the mean; beside it, seed by seed, against dense."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.42 * len(summary) + 1.3), dpi=150, sharey=True)
    for row, one in enumerate(reversed(summary)):
        colour = STYLE.get(one["arm"], ("#009E73", ""))[0]
        for axis, by_seed in zip(axes, (one["image_word_accuracy_by_seed"], one["against_dense"]), strict=True):
            if values := [100 * value for value in by_seed.values()]:
                axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
                axis.plot(np.mean(values), row, "|", color=colour, markersize=16, markeredgewidth=2.5)
        if one["targets"] is not None:
            text, place = f"{one['targets']:.0%} of the targets", ("axes fraction", "data")
            axes[1].annotate(text, (1.01, row), xycoords=place, va="center", fontsize=9, color=FAINT)
    axes[0].set_yticks(range(len(summary)), [one["title"] for one in reversed(summary)])
    axes[0].set_xlabel("held-out accuracy at the end, % (dots: seeds, bar: mean)")
    axes[1].set_xlabel("points against the dense run of the same start")
    axes[1].axvline(0, color=FAINT, linewidth=1)
    for axis in axes:
        axis.grid(axis="x", color="#e6e9ed", linewidth=0.8)
    figure.tight_layout(rect=(0, 0, 0.99, 1))
    figure.savefig(file)
    plt.close(figure)
