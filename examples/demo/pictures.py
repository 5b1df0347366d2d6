"""The report's pictures: held-out quality against targets processed, and captions with what ReGATE keeps of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.patheffects import withStroke
from words import Caption, Piece

# Okabe and Ito's colours, told apart by colour-blind readers; the shapes differ, too.
STYLE = {"dense": ("#444444", "o"), "regate": ("#0072B2", "D"), "random": ("#D55E00", "s")}
LABEL = {"dense": "dense", "regate": "ReGATE", "random": "random"}
SCORES = LinearSegmentedColormap.from_list("scores", ["#f4f7fb", "#c6dbef", "#6baed6", "#2171b5", "#08306b"])
NORM = PowerNorm(0.5, vmin=0, vmax=3, clip=True)
INK, FAINT = "#1c2530", "#8a94a0"
VEIL, ENLARGED = (214, 219, 226), 4  # what lies over a patch that did not run, and how much of it shows

plt.rcParams.update({
    "font.size": 11, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "savefig.facecolor": "white",
})  # fmt: skip


def loss_against_targets(runs: list[dict], baseline: dict, file: Path) -> None:
    """Held-out loss and accuracy of every evaluation against the targets processed until then.

    Args:
        runs: entries of summary.json.
        baseline: the language model that never sees a picture, evaluated on the same captions.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), dpi=150)
    draw_panel(axes[0], runs, baseline, "eval_loss", "Held-out loss, nats per target", is_share=False)
    title = "Held-out accuracy on words that need the picture"
    draw_panel(axes[1], runs, baseline, "image_word_accuracy", title, is_share=True)
    note = (
        f"Targets are answer tokens with loss; elided ones are not counted. {runs[0]['iterations']} iterations each, "
        "the same samples in the same order, one seed; evaluations are dense.\nThe learning rate falls to the end of "
        "each run, so that a point before the end is not what a run of that length would reach."
    )
    figure.text(0.012, 0.015, note, fontsize=9, color=FAINT, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.075, 1, 1), w_pad=3)
    figure.savefig(file)
    plt.close(figure)


def draw_panel(axis, runs: list[dict], baseline: dict, key: str, title: str, *, is_share: bool) -> None:
    """One value of every evaluation of every run; `is_share` values grow upwards and are shown in percent."""
    unit = 100.0 if is_share else 1.0
    axis.set_xlim(0, max(run["targets_processed"] for run in runs) / 1000 * 1.33)
    axis.axhline(baseline[key] * unit, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
    axis.annotate(
        "language model, no picture",
        (1, baseline[key] * unit),
        (-2, 5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=FAINT,
        fontsize=9.5,
    )
    for run in runs:
        colour, marker = STYLE[run["name"]]
        x = [point["targets_processed"] / 1000 for point in run["curve"]]
        y = [point[key] * unit for point in run["curve"]]
        axis.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=2)
        # The label of ReGATE lies on the better side, away from the dense curve.
        above = run["name"] == "regate"
        offset = (-9, 9 if is_share else -12) if above else (9, 0)
        text = f"{LABEL[run['name']]} {y[-1]:.1f} %" if is_share else f"{LABEL[run['name']]} {y[-1]:.3f}"
        axis.annotate(
            text,
            (x[-1], y[-1]),
            offset,
            textcoords="offset points",
            va="center",
            ha="right" if above else "left",
            weight="bold",
            color=colour,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axis.set_title(title, loc="left", weight="bold", fontsize=12.5, pad=10)
    axis.set_xlabel("targets processed, thousands")
    axis.yaxis.set_major_formatter("{x:.0f} %" if is_share else "{x:.2f}")
    axis.margins(y=0.12)
    axis.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axis.set_axisbelow(True)


def kept_words(captions: list[Caption], file: Path, *, title: str, note: str) -> None:
    """Captions beside their pictures; a piece is coloured by its score, struck through where it is elided."""
    width, row_height, head, foot = 12.0, 1.62, 0.72, 1.05
    height = head + row_height * len(captions) + foot
    figure = plt.figure(figsize=(width, height), dpi=150)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))  # inches from the upper left corner
    page.axis("off")
    page.text(0.3, 0.42, title, fontsize=15, weight="bold", va="center")
    for index, caption in enumerate(captions):
        top = head + index * row_height
        picture = figure.add_axes((0.3 / width, 1 - (top + 1.4) / height, 1.4 / width, 1.4 / height))
        picture.imshow(veiled(caption.image, caption.has_run), interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        for spine in picture.spines.values():
            spine.set(visible=True, color="#d5dbe2")
        write_caption(page, caption.pieces, left=1.98, right=width - 0.3, top=top + 0.16)
    colour_bar(figure, width, height)
    page.text(5.5, height - 0.8, note, fontsize=9.5, color=INK, va="top", linespacing=1.5)
    figure.savefig(file)
    plt.close(figure)


def write_caption(page, pieces: list[Piece], *, left: float, right: float, top: float, size: float = 14.0) -> None:
    """Set the pieces in lines; the instruction, which is context, on a line of its own."""
    x, y, line, space = left, top, 0.37, 0.075
    was_context = True
    for index, piece in enumerate(pieces):
        if piece.is_target and was_context:
            x, y = left, y + line
        was_context = not piece.is_target
        x += space if piece.begins_word and x > left else 0
        word = pieces[index : next((j for j in range(index + 1, len(pieces)) if pieces[j].begins_word), len(pieces))]
        style = {"fontsize": size, "va": "center", "zorder": 3}
        if piece.begins_word and x + sum(extent(page, p.text, weight(p), size) for p in word) > right:
            x, y = left, y + line
        span = extent(page, piece.text, weight(piece), size)
        if not piece.is_target:
            page.text(x, y, piece.text, color=FAINT, style="italic", **style)
            x += extent(page, piece.text, "normal", size, "italic")
            continue
        shade = NORM(piece.score)
        pad = 0.03 if piece.begins_word else 0.0
        box = plt.Rectangle((x - pad, y - 0.15), span + pad + 0.03, 0.3, color=SCORES(shade), linewidth=0, zorder=1)
        page.add_patch(box)
        ink = "white" if shade > 0.55 else INK if piece.is_kept else "#5d6873"
        page.text(x, y, piece.text, color=ink, weight=weight(piece), **style)
        if not piece.is_kept:
            page.plot((x - pad, x + span + pad), (y + 0.012, y + 0.012), color="#c1272d", linewidth=1.8, zorder=4)
        x += span


def weight(piece: Piece) -> str:
    return "bold" if piece.needs_image else "normal"


def extent(page, text: str, font_weight: str, size: float, style: str = "normal") -> float:
    """Width of a text in inches."""
    font = matplotlib.font_manager.FontProperties(weight=font_weight, style=style, size=size)
    renderer = page.figure.canvas.get_renderer()
    return renderer.get_text_width_height_descent(text, font, False)[0] / page.figure.dpi


def veiled(image: np.ndarray, has_run: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] uint8 four times as large, a veil over the patches that did not run.

    Args:
        has_run: bool [rows, columns] of patches.
    """
    large = image.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    if has_run.all():
        return large
    rows, columns = (size // count for size, count in zip(large.shape[:2], has_run.shape, strict=True))
    is_veiled = ~has_run.repeat(rows, axis=0).repeat(columns, axis=1)
    large[is_veiled] = (0.15 * large[is_veiled] + 0.85 * np.array(VEIL)).astype(np.uint8)
    large[::rows], large[:, ::columns] = 255, 255
    return large


def film(frames: np.ndarray, has_run: np.ndarray, file: Path, *, note: str) -> None:
    """The frames of a clip side by side, a veil over what did not run.

    Args:
        frames: [T, H, W, 3] uint8.
        has_run: bool [T, rows, columns].
    """
    count = len(frames)
    figure, axes = plt.subplots(1, count, figsize=(12, 12 / count + 0.8), dpi=150)
    for number, (axis, frame, patches) in enumerate(zip(axes, frames, has_run, strict=True), 1):
        axis.imshow(veiled(frame, patches), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"frame {number}: {patches.sum()} of {patches.size}", fontsize=9.5)
        for spine in axis.spines.values():
            spine.set(visible=True, color="#d5dbe2")
    figure.text(0.012, 0.04, note, fontsize=9.5)
    figure.tight_layout(rect=(0, 0.1, 1, 1), w_pad=0.6)
    figure.savefig(file)
    plt.close(figure)


def colour_bar(figure, width: float, height: float) -> None:
    axis = figure.add_axes((0.3 / width, 0.5 / height, 4.6 / width, 0.16 / height))
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(NORM, SCORES), cax=axis, orientation="horizontal", extend="max")
    bar.set_ticks([0, 0.1, 0.5, 1, 2, 3])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, length=3)
    bar.ax.set_title("score = student's loss + 0.5 · teacher's loss (nats)", fontsize=9.5, loc="left", pad=5)
