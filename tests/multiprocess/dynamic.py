"""A LLaVAModel of dynamic resolution over a RADIO tower, and its batches: pictures of several sizes, clips, text alone.

``case["longest"]`` says how long a merged row may be, ``case["dynamic"]`` whether it ``shuffles``, and how many
``frames`` become one (``temporal_patch_dim``): then all pictures have one size, as Megatron asks.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.core.packed_seq_params import PackedSeqParams

# Of every fourth row, in patches: two pictures, one inside the answer, the three frames of a clip, text alone. The
# third width is no multiple of the four that pixel shuffle merges in a row.
SIZES = [[(2, 4), (4, 4)], [(2, 2)], [(2, 4)] * 3, []]
PLACES = [[0, 4], [9], [2, 3, 5], []]
ONE_SIZE = (4, 4)


def model_options(case: dict, vision, patch: int) -> dict:
    """What the model is made with; the tower's config is told its kind."""
    own = case["dynamic"]
    vision.vision_model_type, vision.class_token_len = "radio", 2
    side = ONE_SIZE[0] * patch
    return {
        "img_h": side,
        "img_w": side,
        "patch_dim": patch,
        "dynamic_resolution": True,
        "pixel_shuffle": own.get("shuffles", False),
        "temporal_patch_dim": own.get("frames", 1),
        "radio_force_cpe_eval_mode": True,  # else by chance
    }


def put_pictures(batch: dict, start: int, case: dict, patch: int) -> None:
    """Placeholders, patches and sizes for the rows of a batch, of which ``start`` is the first of all."""
    frames, sizes, counts = case["dynamic"].get("frames", 1), [], []
    generator = torch.Generator().manual_seed(100 + start)
    for row in range(len(batch["tokens"])):
        kind = (start + row) % 4 if start != 4 else 3  # two rows of text make a microbatch without a picture
        own, places = [ONE_SIZE if frames > 1 else size for size in SIZES[kind]], PLACES[kind]
        counts += [len(own)] if kind == 2 else [1] * len(own)
        batch["tokens"][row, places[: math.ceil(len(own) / frames) if kind == 2 else None]] = DEFAULT_IMAGE_TOKEN_INDEX
        sizes += own
    batch["labels"] = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1).clamp_min(0)
    total = sum(height * width for height, width in sizes)
    batch["image"] = torch.randn(1 if sizes else 0, total, 3 * patch**2, generator=generator)
    if sizes:
        batch |= {"imgs_sizes": patch * torch.tensor(sizes), "num_frames": torch.tensor(counts)}


def forward_options(batch: dict, patch: int, frames: int) -> dict:
    """What a script gives the model beside pictures and text; the last of several stages reads ``num_image_tiles``."""
    sizes = batch["imgs_sizes"]
    length_F = (sizes // patch).prod(dim=1)
    ends = torch.cat([torch.zeros(1), length_F.cumsum(0)]).int()
    most = length_F.max().int()
    packing = PackedSeqParams("thd", ends, ends.clone(), max_seqlen_q=most, max_seqlen_kv=most.clone())
    tiles = torch.ones(int((batch["tokens"] == DEFAULT_IMAGE_TOKEN_INDEX).sum()), dtype=torch.int32)
    options = {"imgs_sizes": sizes, "num_image_tiles": tiles, "vision_packed_seq_params": packing}
    return options | ({"num_frames": batch["num_frames"].tolist()} if frames > 1 else {})


def pack_entries(batch: dict, start: int, image_length: int) -> None:
    """Make a row several samples, as examples/multimodal packs them: where each starts, in merged positions."""
    cuts = [[8, 20], [12], [4, 16], [16]][start % 4]
    width_N = torch.where(batch["tokens"][0] == DEFAULT_IMAGE_TOKEN_INDEX, image_length, 1)
    ends = torch.cat([torch.zeros(1), width_N.cumsum(0)]).int()
    batch["cu_lengths"] = ends[[0, *cuts, len(width_N)]][None]


def packing_of(batch: dict) -> PackedSeqParams | None:
    """As the script makes it of a batch; None where rows are not packed."""
    if "cu_lengths" not in batch:
        return None
    ends = batch["cu_lengths"][0]
    most = int(ends.diff().max())
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=most, max_seqlen_kv=most)
