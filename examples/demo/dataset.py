"""The demo's samples as a model's entries: torch only, so that the report can read them, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import default_collate

IMAGE_TOKEN = -200  # LLaVAModel's DEFAULT_IMAGE_TOKEN_INDEX


class Captions(torch.utils.data.Dataset):
    """Rows of one file of data.py as batches' entries; `num_samples` runs through the file again and again.

    With `shuffle` every epoch has an order of its own, by seed: every run sees the same. `split` is Megatron's name for
    the part; its data loader asks for it. Rows that `has_image` says have none give no "image": see `collate`.
    """

    def __init__(
        self, file: Path, num_samples: int, *, with_image: bool, shuffle: bool = False, seed: int = 0, split: Any = None
    ):
        with np.load(file) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files if with_image or name != "images"}
        self.split, self.num_samples, self.with_image, self.seed = split, num_samples, with_image, seed
        self.shuffle = shuffle
        self.order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_samples

    def row(self, index: int) -> int:
        """The row of the file that sample `index` is."""
        num_rows = len(self.arrays["tokens"])
        epoch, position = divmod(index, num_rows)
        if not self.shuffle:
            return position
        if self.order is None or self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(num_rows))
        return int(self.order[1][position])

    def has_image(self, row: int) -> bool:
        """Whether a row's entries begin with a picture."""
        return self.with_image and bool(self.arrays["has_image"][row] if "has_image" in self.arrays else True)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.row(index)
        tokens, mask, needs = (
            torch.from_numpy(self.arrays[name][row].astype(np.int64)) for name in ("tokens", "loss_mask", "needs_image")
        )
        labels, tokens = tokens[1:], tokens[:-1]
        sample = {}
        if self.has_image(row):  # the placeholder predicts the first token, which is context
            labels, mask, needs = torch.cat((tokens[:1], labels)), pad(mask, (1, 0)), pad(needs, (1, 0))
            tokens = pad(tokens, (1, 0), value=IMAGE_TOKEN)
            image = torch.from_numpy(self.arrays["images"][row]).movedim(-1, -3)
            sample["image"] = (image.float() - 200) / 64  # mean and deviation of the pictures
            if image.ndim == 4:  # a clip: its frames are the tiles of one placeholder
                sample |= dict.fromkeys(("num_image_tiles", "num_frames"), torch.tensor(len(image)))
        elif self.with_image:  # as long as the others
            tokens, labels, mask, needs = (pad(values, (0, 1)) for values in (tokens, labels, mask, needs))
        sample |= {"tokens": tokens, "labels": labels, "loss_mask": mask.float(), "needs_image": needs}
        return sample | {"position_ids": torch.arange(len(tokens))}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch whose "image" holds the pictures of the rows that have one: fewer than rows."""
    images = [sample.pop("image") for sample in samples if "image" in sample]
    return default_collate(samples) | ({"image": torch.stack(images)} if images else {})
