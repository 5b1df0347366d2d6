"""Results of the experiment: results.csv, summary.json, summary.md and two pictures, from what the runs left.

    python examples/experiments/run.py --report-only               writes them again
    python examples/experiments/run.py --report-only --docs docs   also into the documentation

What is counted: *targets processed* are answer tokens with loss that were not elided; *compute* is the FLOPs of the
training steps after ReGATE's own count, in dense steps (a run of 240 dense steps is 240), without the teacher; *time*
is the CPU seconds of the training process, teacher and planning included, evaluations left out. Accuracies are of dense
evaluations on held-out pictures, teacher-forced, on the first piece of each word that needs the picture.

Arms are compared in pairs: the difference of two runs of one seed that began with the very same weights, then its mean
and its standard deviation over the seeds. How good a start was, which differs from seed to seed, so falls out.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dataset import Captions

HERE = Path(__file__).resolve().parent
BATCH = re.compile(r"--global-batch-size (\d+)")
LINE = re.compile(
    r"\[regate\] iteration (?P<iteration>\d+) .*?targets kept (?P<kept>\d+)/(?P<targets>\d+)"
    r".*?positions run (?P<run>\d+)/(?P<dense>\d+).*?FLOPs (?P<share>[\d.]+)% of dense"
    r".*?planning (?P<planning>[\d.]+) ms, teacher (?P<teacher>[\d.]+) ms"
)
STEP = re.compile(r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+)")
PICTURES = ("accuracy_against_targets.png", "arms.png")


def write(out: Path, docs: Path | None = None, of: str = "") -> None:
    """Write everything into `out` from its finished runs, and a table and pictures into `docs`.

    `of`: which experiment it is, where it is not that of the config's pictures; the end of names in `docs`, as in
    "-144".
    """
    runs = [
        read_run(folder, out / "data")
        for folder in sorted((out / "runs").glob("*-*"))
        if (folder / "settings").exists()
    ]
    if not runs:
        print("experiment: no finished run yet")
        return
    arms = tomllib.loads((HERE / "arms.toml").read_text())
    grouped = {name: [run for run in runs if run["arm"] == name] for name in arms}
    grouped = {name: found for name, found in grouped.items() if found}
    kinds = json.loads((out / "data" / "about.json").read_text())["kinds"]
    write_csv(runs, out / "results.csv", kinds)
    summary = []
    for name, found in grouped.items():
        dense, random = (grouped.get(twin_of(arms, name, kind), []) for kind in ("dense", "random"))
        lengths = [run for other, runs in grouped.items() if is_a_length_of_dense(arms, other, name) for run in runs]
        summary.append(summarise(name, arms[name]["title"], found, dense, random, lengths))
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    lines = table(summary, kinds)
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    import curves

    drawn = {name: runs for name, runs in grouped.items() if arms[name].get("main") or arms[name].get("drawn")}
    curves.over_training(drawn, arms, out / PICTURES[0], first="compute" if of else "targets_processed")
    curves.all_arms(summary, out / PICTURES[1])
    print("\n".join(lines))
    print(f"{out / 'results.csv'}, {out / 'summary.json'}, {', '.join(str(out / name) for name in PICTURES)}")
    if docs is not None:
        write_docs(out, docs, {"results": lines, "starts": starts_table(out / "starts")}, of)


def read_run(folder: Path, data: Path) -> dict:
    """One run: its about.json and, per evaluation, quality, targets processed, compute and seconds so far."""
    about, log = json.loads((folder / "about.json").read_text()), (folder / "log.txt").read_text(errors="replace")
    evaluations = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    counted = {int(found["iteration"]): found for found in LINE.finditer(log)}
    seconds, last = {0: 0.0}, 0
    for found in STEP.finditer(log):
        iteration = int(found[1])
        seconds[iteration] = seconds[last] + (iteration - last) * float(found[2]) / 1000
        last = iteration
    per_step = dense_targets(folder, data, about, int(BATCH.search(log)[1]))
    curve, before = [], {"iteration": 0, "targets_processed": 0, "targets_total": 0, "compute": 0.0}
    for evaluation in evaluations:
        steps = evaluation["iteration"] - before["iteration"]
        total = int(per_step[before["iteration"] : evaluation["iteration"]].sum())
        found = counted.get(evaluation["iteration"])
        assert found is None or int(found["targets"]) == total, f"{folder}: the log counts other targets than the data"
        point = evaluation | {
            "targets_processed": before["targets_processed"] + (int(found["kept"]) if found else total),
            "targets_total": before["targets_total"] + total,
            "compute": round(before["compute"] + steps * (float(found["share"]) / 100 if found else 1.0), 2),
            "seconds": round(seconds.get(evaluation["iteration"], float("nan")), 1),
        }
        curve.append(point)
        before = point
    return about | {"curve": curve}


def dense_targets(folder: Path, data: Path, about: dict, batch: int) -> np.ndarray:
    """Targets of every step's batch, elided or not."""
    own = data.parent / about["data"] if "data" in about else data / "fresh" if about.get("fresh") else data
    file = own / "train.npz"
    rows = Captions(file, about["iterations"] * batch, with_image=False, shuffle=True, seed=about["seed"])
    targets = rows.arrays["loss_mask"].sum(axis=1).astype(np.int64)
    order = [rows.row(i) for i in range(len(rows))]
    return targets[order].reshape(-1, batch).sum(axis=1)


def write_csv(runs: list[dict], file: Path, kinds: list[str]) -> None:
    """One line per evaluation."""
    names = ("iteration", "targets_processed", "targets_total", "compute", "seconds", "eval_loss")
    names += ("cpu_seconds", "image_word_accuracy", "all_word_accuracy")
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["arm", "seed", *names, *kinds, "start", "weights"])
        for run in runs:
            for point in run["curve"]:
                values = [round(point[name], 5) if isinstance(point[name], float) else point[name] for name in names]
                row = [run["arm"], run["seed"], *values, *point["accuracy_by_kind"], run["start"], point["weights"]]
                writer.writerow(row)


def twin_of(arms: dict, name: str, kind: str) -> str | None:
    """The arm that an arm is compared with: what its row says, or the usual one where that has the same data. A dense
    arm on data of its own counts as its own twin: it is what others of that data are shares of.
    """
    twin = arms[name].get(kind, kind)
    if arms[twin].get("data") == arms[name].get("data"):
        return twin
    return name if kind == "dense" and arms[name].get("plain") else None


def is_a_length_of_dense(arms: dict, other: str, name: str) -> bool:
    """Whether `other` is `name`'s dense arm or a shorter or longer one on the same data, where `name` is not dense."""
    plain = {one for one, arm in arms.items() if arm.get("plain") and "environment" not in arm}
    return name not in plain and other in plain and arms[other].get("data") == arms[name].get("data")


def summarise(
    name: str, title: str, runs: list[dict], dense: list[dict], random: list[dict], lengths: Sequence[dict] = ()
) -> dict:
    """One arm's line of the table; `dense` and `random` are the runs that it is compared with, seed by seed; `lengths`
    are dense runs of several lengths.
    """
    ends = [run["curve"][-1] for run in runs]
    entry = {"arm": name, "title": title, "seeds": len(runs), "iterations": runs[0]["iterations"]}
    for key in ("image_word_accuracy", "all_word_accuracy", "eval_loss"):
        values = [end[key] for end in ends]
        entry[key] = statistics.mean(values)
        entry[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        entry[f"{key}_by_seed"] = {run["seed"]: end[key] for run, end in zip(runs, ends, strict=True)}
    entry["by_kind"] = np.mean([end["accuracy_by_kind"] for end in ends], axis=0).round(4).tolist()
    shares = defaultdict(list)
    for run, twin in pairs(runs, dense):
        end, curve = run["curve"][-1], twin["curve"]
        shares["targets"].append(end["targets_processed"] / curve[-1]["targets_processed"])
        shares["compute"].append(end["compute"] / curve[-1]["compute"])
        shares["time"].append(end["cpu_seconds"] / curve[-1]["cpu_seconds"])
        best = max(point["image_word_accuracy"] for point in curve)
        reached = [point for point in run["curve"] if point["image_word_accuracy"] >= best]
        shares["peak"].append(reached[0]["targets_processed"] / curve[-1]["targets_processed"] if reached else None)
    for key in ("targets", "compute", "time"):
        entry[key] = statistics.mean(shares[key]) if shares[key] else None
    entry["targets_at_dense_peak"] = shares["peak"]
    for key, twins in (("against_dense", dense), ("against_random", random)):
        entry[key] = {run["seed"]: gain(run, twin) for run, twin in pairs(runs, twins) if run is not twin}
    found = {run["seed"]: at_equal_time(run, [one for one in lengths if pairs([run], [one])]) for run in runs}
    entry["against_dense_in_its_time"] = {seed: value for seed, value in found.items() if value is not None}
    return entry


def at_equal_time(run: dict, lengths: list[dict]) -> float | None:
    """How much more is right at the end than dense runs have after as much CPU time: between the two that took a
    little less and a little more, each with a learning rate that fell to its own end. None where there are no two.
    """
    end = run["curve"][-1]
    ends = sorted((one["curve"][-1]["cpu_seconds"], one["curve"][-1]["image_word_accuracy"]) for one in lengths)
    if len(ends) < 2 or end["cpu_seconds"] < ends[0][0]:
        return None
    return end["image_word_accuracy"] - float(np.interp(end["cpu_seconds"], *zip(*ends, strict=True)))


def pairs(runs: list[dict], twins: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of one seed that began with the same weights."""
    by_start = {(twin["seed"], twin["start"]): twin for twin in twins}
    found = [(run, by_start.get((run["seed"], run["start"]))) for run in runs]
    return [(run, twin) for run, twin in found if twin is not None]


def gain(run: dict, twin: dict) -> float:
    """How much more of the words that need the picture are right at the end."""
    return run["curve"][-1]["image_word_accuracy"] - twin["curve"][-1]["image_word_accuracy"]


def difference(by_seed: dict[int, float]) -> str:
    """Points, mean ± standard deviation over seeds, and in how many seeds the arm was ahead."""
    values = [100 * value for value in by_seed.values()]
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else "–"
    ahead = sum(value > 0 for value in values)
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f} ({ahead} of {len(values)})"


def table(summary: list[dict], kinds: list[str]) -> list[str]:
    """Markdown."""
    names = ("arm", "seeds", "targets", "compute", "time", "words that need the picture", "against dense")
    names += ("against dense in its time", "against random", " / ".join(kinds), "all words", "loss")
    head = " | ".join(names)
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for one in summary:
        deviation = one["image_word_accuracy_deviation"]
        spread = f" ± {100 * deviation:.1f}" if deviation is not None else ""
        share = ["–" if one[key] is None else f"{one[key]:.0%}" for key in ("targets", "compute", "time")]
        by_kind = " / ".join(f"{100 * value:.0f}" for value in one["by_kind"])
        cells = [
            one["title"],
            str(one["seeds"]),
            *share,
            f"{100 * one['image_word_accuracy']:.1f}{spread}",
            difference(one["against_dense"]),
            difference(one["against_dense_in_its_time"]),
            difference(one["against_random"]),
            by_kind,
        ]
        lines.append(f"| {' | '.join(cells)} | {100 * one['all_word_accuracy']:.1f} | {one['eval_loss']:.3f} |")
    return lines


def starts_table(folder: Path) -> list[str]:
    """Markdown: how every seed's start came to be."""
    head = "seed | steps of the tower | objects it names | iterations of short captions | object words right | weights"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for file in sorted(folder.glob("[0-9]*/about.json"), key=lambda file: int(file.parent.name)):
        one = json.loads(file.read_text())
        cells = (file.parent.name, one["vision_steps"], f"{100 * one['vision_recall']:.1f}", one["align_iterations"])
        lines.append(f"| {' | '.join(map(str, cells))} | {100 * one['align_object']:.1f} | `{one['weights']}` |")
    return lines


def write_docs(out: Path, docs: Path, tables: dict[str, list[str]], of: str = "") -> None:
    """Put the tables between their markers in learning.md, and pictures and results.csv beside it."""
    page = docs / "learning.md"
    text = page.read_text()
    for name, lines in tables.items():
        begin, end = f"<!-- {name}{of} -->", f"<!-- /{name}{of} -->"
        before, rest = text.split(begin)
        text = before + "\n".join([begin, *lines, end]) + rest.split(end)[1]
    page.write_text(text)
    for name in PICTURES:
        shutil.copy(out / name, docs / f"learning{of}_{name}")
    shutil.copy(out / "results.csv", docs / f"learning{of}_results.csv")
