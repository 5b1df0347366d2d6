"""A short clip of drawings, and what a sparse step's plan runs of it: by the rule for clips, without any training."""

from __future__ import annotations

import data
import numpy as np
import torch
from PIL import Image

from regate_megatron import ReGateConfig
from regate_megatron.batches import MicrobatchFacts
from regate_megatron.batches.media import Media, cells_of_image
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.planner import Planner
from regate_megatron.step.step import Step

FRAMES, SIDE, KEEP_RATIO = 8, 6, 0.25  # 6 x 6 visual positions a frame
MOVES, STAYS = "butterfly", "sunflower"


def draw() -> np.ndarray:
    """One drawing that stays and one that passes it; uint8 [T, H, W, 3]."""
    size = data.IMAGE_SIZE
    emoji = {one.name: one.art for one in data.load_emoji(size // 3)}
    frames = []
    for number in range(FRAMES):
        frame = Image.new("RGB", (size, size), data.GROUNDS["blue"])
        frame.paste(emoji[STAYS], (size - size // 3 - 2, size - size // 3 - 2), emoji[STAYS])
        across = number * (size - size // 3) // (FRAMES - 1)
        frame.paste(emoji[MOVES], (across, size // 4 + (number % 2) * 4), emoji[MOVES])
        frames.append(np.asarray(frame))
    return np.stack(frames)


def planned(frames: np.ndarray) -> np.ndarray:
    """Which patches of every frame a sparse step runs, the clip alone in its row; bool [T, rows, columns]."""
    grid = (len(frames), SIDE, SIDE)
    pixels = np.concatenate(
        [cells_of_image(torch.from_numpy(frame).permute(2, 0, 1), SIDE, SIDE) for frame in frames.astype(np.float32)]
    )
    place_1S, key_12 = torch.arange(len(pixels) + 1)[None], torch.zeros(1, 2, dtype=torch.int64)
    is_target_1S = place_1S == len(pixels)
    facts = MicrobatchFacts(
        is_target_BS=is_target_1S,
        is_context_BS=~is_target_1S,
        is_visual_BS=~is_target_1S,
        media=Media(
            sample_I=torch.tensor([0]),
            count_I=torch.tensor([len(pixels)]),
            grid_I3=torch.tensor([grid]),
            pixels=lambda _: pixels,
        ),
        token_BS=place_1S,
        position_id_BS=place_1S,
        label_BS=place_1S,
        reference_key_N2=key_12,
        difficulty_key_N2=key_12,
    )
    config = ReGateConfig(
        keep_ratio=1.0, visual_keep_ratio=KEEP_RATIO, visual_score="static", budget="per-sample", length_multiple=1
    )
    step = Step(0, "sparse", elides=True, facts=[facts])
    Planner(config, Topology(0, 1, True, 0, 1, None, None, None), multiple=1).plan(step)
    return step.plan.microbatches[0].kept_mask()[0, :-1].reshape(grid).numpy()
