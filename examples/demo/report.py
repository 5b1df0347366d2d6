"""The demo's results: summary.json, two pictures, report.html, and a table for the terminal.

python examples/demo/report.py --out out/demo      writes them again from what the runs left there
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from pathlib import Path

import clip
import numpy as np
import page
import pictures
import words
from counts import Counts, count, count_dense, cumulated

RUNS = ("dense", "regate", "random")
NAMES = {"dense": "dense", "regate": "ReGATE", "random": "random"}
TRACES = {"regate": "trace", "random": "trace_random"}
VISUAL_TRACE = "trace_visual"  # of a short run that leaves patches out, too
LOSS_PICTURE, WORD_PICTURE, CLIP_PICTURE = "loss_against_targets.png", "kept_words.png", "kept_of_a_clip.png"
LEAST_OCCURRENCES = 40  # of a word, to be ranked
HOW_COUNTED = (
    "targets_total: answer tokens with loss, <eos> included, in all batches of the run. targets_processed: those that "
    "were not elided. positions_dense: positions of all rows in all batches, padding included. positions_run: the "
    "same, in sparse steps with the elided length, fill included; the first decoder layer runs every position in "
    "every step, the other three run these. Counted from the traces of ReGATE and random, which held the same samples "
    "in every iteration; the dense run has no trace, was given these samples, too, and elides nothing. seconds: "
    "Megatron's own time of the training steps, planning and teacher included, start-up and evaluations not."
)


def write(out: Path, settings: dict, seconds: dict[str, float]) -> None:
    """Write everything into `out` and print the table; `seconds` are the training times of the runs."""
    counts = count_runs(out)
    runs = [summarise(name, counts[name], read_lines(out / "runs" / name / "heldout.jsonl")) for name in RUNS]
    for run in runs:
        run["seconds"] = round(seconds[run["name"]], 1)
    baseline = read_lines(out / "start" / "text.jsonl")[-1]
    training = words.Samples(out / "data", "train")
    traced = {run: words.kept_in_training(training, out / folder) for run, folder in TRACES.items()}
    shares = {run: words.share_kept([caption for _, caption in captions]) for run, captions in traced.items()}
    ranking = words.words_by_share([caption for _, caption in traced["regate"]], LEAST_OCCURRENCES)
    reading = read_results(runs, shares, ranking)
    summary = {
        "runs": runs,
        "language_model_without_picture": baseline,
        "share_of_targets_kept_in_sparse_steps": shares,
        "words_kept_most": ranking[:10],
        "words_kept_least": ranking[-10:],
        "settings": settings,
        "how_counted": HOW_COUNTED,
        "reading": reading,
    }
    write_aside(out / "summary.json", json.dumps(summary, indent=1))
    pictures.loss_against_targets(runs, baseline, out / LOSS_PICTURE)
    draw_heldout(out, settings["keep_ratio"])
    draw_clip(out / CLIP_PICTURE)
    both = words.kept_in_training(training, out / VISUAL_TRACE)
    write_page(out, runs, reading, traced["regate"], both)
    print_results(runs, reading, out)


def draw_heldout(out: Path, keep_ratio: float) -> None:
    """Held-out captions with what ReGATE would keep of them."""
    heldout, losses = words.Samples(out / "data", "heldout"), out / "runs" / "regate" / "losses.npz"
    captions = words.kept_if_trained(heldout, losses, out / "start" / "reference.npz", keep_ratio)
    pictures.kept_words(
        words.one_per_instruction(captions, 4),
        out / WORD_PICTURE,
        title=f"What ReGATE keeps of held-out captions (the best-scored {keep_ratio:.0%} of the targets)",
        note="Bold: the word needs the picture. Struck through: elided, that is, the position that\n"
        "predicts it leaves the decoder after the first layer. Grey italics: context, always kept.\n"
        "No training step sees these captions: their difficulty is the trained model's loss.",
    )


def draw_clip(file: Path) -> None:
    """A clip with what a plan runs of it."""
    frames = clip.draw()
    has_run = clip.planned(frames)
    note = (
        f"{has_run.sum()} of {has_run.size} patches run; all of the first frame, then those that differ most from the "
        "same place one frame earlier. Veiled: elided."
    )
    pictures.film(frames, has_run, file, note=note)


def latest(traced: list[tuple[int, words.Caption]]) -> tuple[int, list[words.Caption]]:
    """The last iteration and four of its captions."""
    last = max(iteration for iteration, _ in traced)
    return last, words.one_per_instruction([caption for iteration, caption in traced if iteration == last], 4)


def write_page(
    out: Path,
    runs: list[dict],
    reading: list[str],
    traced: list[tuple[int, words.Caption]],
    both: list[tuple[int, words.Caption]],
) -> None:
    """report.html, after the pictures; `traced` is what ReGATE kept in training, with the iterations, and `both` what
    the run kept that leaves patches out, too.
    """
    (last, captions), (visual_last, visual_captions) = latest(traced), latest(both)
    page.write_page(
        out / "report.html",
        title="ReGATE on pictures of emoji: dense, ReGATE and random elision",
        lead=reading,
        table=table(runs),
        sections=[
            (
                "Held-out quality against targets processed",
                "Every evaluation is dense, on 256 held-out pictures.",
                out / LOSS_PICTURE,
            ),
            ("What ReGATE keeps: held-out captions", "", out / WORD_PICTURE),
            (
                f"What ReGATE kept: training captions in iteration {last}",
                "From the trace: the scores of that step and what ran. In training a row may keep more than the ratio: "
                "all rows of a step have one length, and shorter captions fill it with their own next best words.",
                captions,
            ),
            (
                f"Words and patches: what a run kept that halves the pictures, too ({visual_last} iterations)",
                "With --regate-visual-keep-ratio 0.5, evenly spread. Veiled: the patch leaves "
                "the decoder after the first layer, as words struck through do; the tower sees them all. The run is "
                "too short to have learned much, and so are the scores of its words.",
                visual_captions,
            ),
            (
                "The same of a clip",
                f"What the plan of a sparse step runs with --regate-visual-keep-ratio {clip.KEEP_RATIO:g} "
                "--regate-visual-score static; this demo trains on pictures, not on clips.",
                out / CLIP_PICTURE,
            ),
        ],
        foot=[HOW_COUNTED, json.loads((out / "data" / "about.json").read_text())["licence"]],
    )


def count_runs(out: Path) -> dict[str, dict[int, Counts]]:
    """Counts per run and iteration; both traced runs must have had the same samples."""
    counts = {run: count(out / folder) for run, folder in TRACES.items()}
    regate, chance = ([one.samples for one in counts[run].values()] for run in TRACES)
    assert regate == chance, "the runs had other samples: was the code changed between them? Run the demo again"
    return counts | {"dense": count_dense(counts["regate"])}


def summarise(name: str, counts: dict[int, Counts], evaluations: list[dict]) -> dict:
    """One run's entry of summary.json, without its time."""
    processed = cumulated(counts)
    curve = [{**line, "targets_processed": processed[line["iteration"]]} for line in evaluations]
    fields = ("targets_total", "targets_processed", "positions_dense", "positions_run")
    return {
        "name": name,
        "iterations": len(counts),
        **{field: sum(getattr(one, field) for one in counts.values()) for field in fields},
        **{key: evaluations[-1][key] for key in ("eval_loss", "image_word_accuracy", "all_word_accuracy")},
        "curve": curve,
    }


def table(runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows."""
    head = [
        "run",
        "targets processed",
        "positions run",
        "seconds",
        "held-out loss",
        "accuracy: image words",
        "all words",
    ]
    rows = []
    for run in runs:
        shares = [
            f"{run[part]:,} ({run[part] / run[total]:.0%})"
            for part, total in (("targets_processed", "targets_total"), ("positions_run", "positions_dense"))
        ]
        quality = [f"{run['eval_loss']:.3f}", f"{run['image_word_accuracy']:.1%}", f"{run['all_word_accuracy']:.1%}"]
        rows.append([NAMES[run["name"]], *shares, f"{run['seconds']:.0f}", *quality])
    return head, rows


def read_results(runs: list[dict], shares: dict, ranking: list[tuple[str, float, int]]) -> list[str]:
    """What the numbers say and what they do not, in sentences."""
    by_name = {run["name"]: run for run in runs}
    dense, regate, chance = (by_name[name] for name in RUNS)
    gap = regate["image_word_accuracy"] - chance["image_word_accuracy"]
    versus = "better than" if gap > 0.02 else "worse than" if gap < -0.02 else "about as good as"
    at_equal = accuracy_after(dense, regate["targets_processed"])
    saved = 1 - regate["targets_processed"] / regate["targets_total"]
    most, least = (", ".join(entry[0] for entry in part) for part in (ranking[:8], ranking[:-9:-1]))
    shown = {run: {group: f"{share:.1%}" for group, share in groups.items()} for run, groups in shares.items()}
    return [
        f"With {saved:.0%} of the targets elided, ReGATE reaches {regate['image_word_accuracy']:.1%} on held-out words "
        f"that need the picture: {versus} random elision of as many targets ({chance['image_word_accuracy']:.1%}). "
        f"Dense training reaches {dense['image_word_accuracy']:.1%}; after as many targets as ReGATE it stood at "
        f"{at_equal:.1%}, amid its learning-rate schedule.",
        f"In sparse steps ReGATE kept {shown['regate']['needs_image']} of the words that need the picture and "
        f"{shown['regate']['others']} of the others (random: {shown['random']['needs_image']} and "
        f"{shown['random']['others']}). Kept most often: {most}. Least often: {least}.",
        "One seed and a tiny model, far from converged: a demonstration, no benchmark. On a CPU and at this size the "
        "seconds are mostly overhead; they say little about a GPU.",
    ]


def accuracy_after(run: dict, targets: int) -> float:
    """A run's accuracy on words that need the picture after so many targets, between its evaluations by a line."""
    values = [[point[key] for point in run["curve"]] for key in ("targets_processed", "image_word_accuracy")]
    return float(np.interp(targets, *values))


def print_results(runs: list[dict], reading: list[str], out: Path) -> None:
    head, rows = table(runs)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    print()
    print("\n".join(textwrap.fill(text, 110) for text in reading))
    print(f"\nReport: {os.path.relpath(out / 'report.html')} (pictures and summary.json beside it)")


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_aside(file: Path, text: str) -> None:
    """Write beside the file, then rename."""
    aside = file.with_name(file.name + ".incomplete")
    aside.write_text(text)
    aside.rename(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    earlier = json.loads((folder / "summary.json").read_text())
    write(folder, earlier["settings"], {run["name"]: run["seconds"] for run in earlier["runs"]})
