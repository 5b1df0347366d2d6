#!/usr/bin/env python3
"""The vision tower's share of a step, by formula, for models as they are trained: what is left to gain before it.

    python -m benchmarks.tower_share

Multiply-adds of linear layers and attention (causal in the decoder), as in work.py, of one row: backward is twice the
forward; a frozen tower has none, and the first decoder layer runs every position. *Tower* is the tower with its
projector, of the whole step: dense, and sparse with 0.5 of the targets and 0.25 of the visual positions. *Patches
left out* is how much faster that sparse step would be if the same 0.25 of the patches entered the tower at all.

Sizes are those of the models' published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

KEEP_TARGETS, KEEP_VISUAL = 0.5, 0.25
FORWARD_AND_BACKWARD = 3
PROMPT, ANSWER = 64, 128


@dataclass(frozen=True)
class Tower:
    """``weights`` of one layer; ``window``: patches that attend to one another; ``per_position``: patches of one."""

    layers: int
    hidden: int
    weights: int
    window: int
    per_position: int
    projector: int

    def work(self, visual: float, window: float, *, is_frozen: bool) -> float:
        """Of ``visual`` positions, every window with ``window`` patches in it; the projector is trained."""
        patches = visual * self.per_position
        forward = self.layers * patches * (2 * self.weights + 4 * self.hidden * window)
        return forward * (1 if is_frozen else FORWARD_AND_BACKWARD) + FORWARD_AND_BACKWARD * 2 * visual * self.projector


@dataclass(frozen=True)
class Decoder:
    """``weights`` of one layer."""

    layers: int
    hidden: int
    weights: int
    vocabulary: int

    def work(self, dense: float, short: float) -> float:
        """One layer on ``dense`` positions, the others and the LM head on ``short``."""

        def layer(positions: float) -> float:
            return 2 * positions * self.weights + 2 * self.hidden * positions**2

        head = 2 * short * self.hidden * self.vocabulary
        return FORWARD_AND_BACKWARD * (layer(dense) + (self.layers - 1) * layer(short) + head)


def _swiglu(hidden: int, inner: int, key_values: int) -> int:
    return 2 * hidden * (hidden + key_values) + 3 * hidden * inner


MODELS = {  # name: tower, decoder, visual positions of a row
    "LLaVA-1.5-7B, a picture": (
        Tower(23, 1024, 12 * 1024**2, 577, 1, 1024 * 4096 + 4096**2),
        Decoder(32, 4096, _swiglu(4096, 11008, 4096), 32000),
        576,
    ),
    "Qwen2.5-VL-7B, 16 frames of 448 pixels": (
        Tower(32, 1280, _swiglu(1280, 3420, 1280), 64, 4, 5120**2 + 5120 * 3584),  # four of its layers have no windows
        Decoder(28, 3584, _swiglu(3584, 18944, 512), 152064),
        2048,
    ),
}


def share(name: str, *, is_frozen: bool) -> tuple[float, float, float]:
    """The tower's share of the dense and of the sparse step, and how much faster that were with fewer patches."""
    tower, decoder, visual = MODELS[name]
    dense = PROMPT + ANSWER + visual
    short = PROMPT + KEEP_TARGETS * ANSWER + KEEP_VISUAL * visual
    whole = tower.work(visual, tower.window, is_frozen=is_frozen)
    part = tower.work(KEEP_VISUAL * visual, KEEP_VISUAL * tower.window, is_frozen=is_frozen)
    sparse = decoder.work(dense, short)
    # patches that are left out have no place in the first layer either: there would be no dense layer
    without = decoder.work(short, short)
    return (
        whole / (whole + decoder.work(dense, dense)),
        whole / (whole + sparse),
        (whole + sparse) / (part + without),
    )


def table() -> list[str]:
    """Markdown."""
    lines = [
        "| row | tower | of the dense step | of the sparse step "
        "| if patches were left out before the tower (not built) |",
        "|---|---|---|---|---|",
    ]
    for name in MODELS:
        for is_frozen in (False, True):
            dense, sparse, gain = share(name, is_frozen=is_frozen)
            state = "frozen" if is_frozen else "trained"
            lines.append(f"| {name} | {state} | {dense:.0%} | {sparse:.0%} | {gain:.2f} times as fast again |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
