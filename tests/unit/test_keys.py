"""Content keys stay what they are, bit by bit: saved difficulty and cached reference losses are found by them.

A value that changes here leaves every cache and every saved state of users without an answer: then the formats' numbers
have to go up, so that they are refused by name.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import GPTBatches, LLaVABatches, MultimodalBatches, NamedSamples, QwenVLBatches
from regate_megatron.batches.facts import MicrobatchFacts, key_hex

IMAGE, VIDEO, IGNORE = 91, 92, -100


def _rows(tokens: list[list[int]], loss: list[list[int]], **more) -> dict:
    """Rows whose labels are the next tokens."""
    token_BS = torch.tensor(tokens)
    return {"tokens": token_BS, "labels": token_BS.roll(-1, dims=1), "loss_mask": torch.tensor(loss).float(), **more}


TEXT = _rows([[5, 6, 7, 8, 9, 2, 2, 2], [5, 6, 7, 8, 4, 3, 1, 0]], [[0, 0, 1, 1, 1, 0, 0, 0], [0] * 8])
LATER = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], range(8)])
PACKED = dict(TEXT, cu_seqlens=torch.tensor([[0, 3, 8, 8], [0, 4, 8, 8]]))
PICTURES = _rows(
    [[5, IMAGE, 6, 7, 8, 2, 2], [IMAGE, 3, IMAGE, 4, 5, 6, 7]],
    [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]],
    image=torch.arange(36.0).view(3, 3, 2, 2),
)
UNSHIFTED = {
    "tokens": torch.tensor([[IMAGE, 5, 6, 7, 8, 0]]),
    "labels": torch.tensor([[IGNORE, IGNORE, IGNORE, 7, 8, 0, 0]]),
    "imgs": torch.ones(1, 3, 2, 2),
    "num_tiles": torch.ones(1, dtype=torch.int32),
    "cu_lengths": torch.zeros(1, 1, dtype=torch.int32),
}


class _Visual(SimpleNamespace):
    """Stands where Megatron-Bridge's ``GenericVisualInputs`` does."""

    def normalized_for_model(self):
        return vars(self)


QWEN = _rows(
    [[7, *[VIDEO] * 4, 8, IMAGE, IMAGE, 9, 6], [IMAGE, IMAGE, 7, 8, 5, 4, 3, 1, 1, 1]],
    [[0, 0, 0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]],
    visual_inputs=_Visual(
        pixel_values=torch.arange(96.0).view(16, 6),
        image_grid_thw=torch.tensor([[1, 2, 4], [1, 2, 4]]),
        pixel_values_videos=torch.arange(96.0, 192.0).view(16, 6),
        video_grid_thw=torch.tensor([[2, 2, 4]]),
        second_per_grid_ts=torch.tensor([0.5]),
    ),
)
GAPS = _rows([[0, 5, 6, 0, 7, 8, 0, 0], [1, 5, 6, 1, 7, 8, 1, 1]], [[0] * 8, [0, 0, 0, 0, 1, 0, 0, 0]])
GAPS["attention_mask"] = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1, 0, 0]])

LLAVA = {"image_length": 3, "image_token": IMAGE, "max_length": 64, "pads_to_max": False}
PLAIN_QWEN = QwenVLBatches(IMAGE, VIDEO, merge_size=2)
CASES = {
    "text": (GPTBatches(), TEXT),
    "learned positions": (GPTBatches(reads_position_ids=True), dict(TEXT, position_ids=LATER)),
    "mrope": (GPTBatches(), dict(TEXT, position_ids=torch.stack([LATER, 2 * LATER, LATER]))),
    "packed": (GPTBatches(), PACKED),
    "pictures": (LLaVABatches(**LLAVA), PICTURES),
    "pictures, learned positions": (
        LLaVABatches(**LLAVA, reads_position_ids=True),
        dict(PICTURES, position_ids=LATER[:, :7]),
    ),
    "labels not shifted": (MultimodalBatches(LLaVABatches(**LLAVA), 0), UNSHIFTED),
    "pictures and clips": (PLAIN_QWEN, QWEN),
    "gaps": (PLAIN_QWEN, GAPS),
    "text alone": (NamedSamples(PLAIN_QWEN, "text"), QWEN),
    "named": (NamedSamples(GPTBatches(), "id"), dict(TEXT, id=["a", "b"])),
}
KEYS = {
    "text": (
        ["141d3af25e9baaca4ff1e38c6912c4e1", "3154175e4892b122f54095dd7fafdb3b"],
        ["141d3af25e9baaca4ff1e38c6912c4e1", "3154175e4892b122f54095dd7fafdb3b"],
    ),
    "learned positions": (
        ["4834f614377253724f186bf9038d1ca2", "3154175e4892b122f54095dd7fafdb3b"],
        ["4834f614377253724f186bf9038d1ca2", "3154175e4892b122f54095dd7fafdb3b"],
    ),
    "mrope": (
        ["ea8146f5a6339f122c29fdb5eecc1b64", "99bf18d1aa393482d916f1b2e2784655"],
        ["ea8146f5a6339f122c29fdb5eecc1b64", "99bf18d1aa393482d916f1b2e2784655"],
    ),
    "packed": (
        [
            "1802f6f8f302d7a778152e4fc920f0d9",
            "98286601260af6c5833ccb7ed29f8e39",
            "66f1d2be7f52cdb5bc30b183cecd2314",
            "326976bf292611970b0fb2824819b2f3",
        ],
        [
            "1802f6f8f302d7a778152e4fc920f0d9",
            "98286601260af6c5833ccb7ed29f8e39",
            "66f1d2be7f52cdb5bc30b183cecd2314",
            "326976bf292611970b0fb2824819b2f3",
        ],
    ),
    "pictures": (
        ["cfb06e19fc3b3dd77d2547fe1990b167", "0e2ea41e101d71a0adfd0502b1100fad"],
        ["a4ffe1bfbe1acb4e1fb4f94a1bf5421f", "7f2563b807e371097b60181d1706ebc6"],
    ),
    "pictures, learned positions": (
        ["588bb697cf5276a5b7188d2fca769da9", "0e2ea41e101d71a0adfd0502b1100fad"],
        ["3228c4ebfa70e36902fba94c09eae2b4", "7f2563b807e371097b60181d1706ebc6"],
    ),
    "labels not shifted": (["1b9334b76040bc102a1843733bd848fe"], ["62ab002fd5743b51631bc7fa81875758"]),
    "pictures and clips": (
        ["0fb05b12965ad7576e12b06879be4ff9", "ed86bc3dce41a3bbbc824469e929e91e"],
        ["d3d85fb2f148ad3463564115acd54d0e", "ba478a6c4e59f2b465cbde1025077047"],
    ),
    "gaps": (
        ["d32001b47b4f472d2da9aefce347a4fb", "80e9c46be772bf041281e0af6b8d2130"],
        ["d32001b47b4f472d2da9aefce347a4fb", "80e9c46be772bf041281e0af6b8d2130"],
    ),
    "text alone": (
        ["0fb05b12965ad7576e12b06879be4ff9", "ed86bc3dce41a3bbbc824469e929e91e"],
        ["1c22f66542a4abce8f1c577762c124d5", "51ccae7da807d8a696b0fc733227b139"],
    ),
    "named": (
        ["141d3af25e9baaca4ff1e38c6912c4e1", "3154175e4892b122f54095dd7fafdb3b"],
        ["f427aa41d364034258d63df884de2988", "e32fc7f3d681bc9ba10c3e14adfb8b7b"],
    ),
}


def _read(facts: MicrobatchFacts) -> tuple[list[str], list[str]]:
    return tuple([key_hex(key_2) for key_2 in key_N2] for key_N2 in (facts.reference_key_N2, facts.difficulty_key_N2))


@pytest.mark.parametrize("name", CASES)
def test_keys_are_what_they_always_were(name):
    adapter, batch = CASES[name]
    assert _read(adapter.read(batch)) == KEYS[name]
