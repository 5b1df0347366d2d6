"""A model of the shape that Megatron-Bridge's Qwen2.5-VL has, where Bridge is not installed, and batches for it.

No tower: placeholders have embeddings of their own, as any token. What is real is Megatron's GPTModel with mRoPE, and
the adapter, which asks the model for positions and takes grids and patches from the batch.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

IMAGE_TOKEN, VIDEO_TOKEN, MERGE = 60, 61, 2
CLIP, PICTURE = (3, 2, 2), (1, 2, 2)  # merged; a row has one of each
CLIP_START, PICTURE_START = 2, 16


class QwenLike(torch.nn.Module):
    """A language model inside a larger one."""

    def __init__(self, language_model: torch.nn.Module) -> None:
        super().__init__()
        self.language_model, self.config = language_model, language_model.config
        self.config.image_token_id, self.config.video_token_id = IMAGE_TOKEN, VIDEO_TOKEN
        self.config.vision_config = SimpleNamespace(spatial_merge_size=MERGE)
        self.set_input_tensor = language_model.set_input_tensor
        self.sharded_state_dict = language_model.sharded_state_dict

    def forward(self, *args, **kwargs):
        """That of the language model."""
        return self.language_model(*args, **kwargs)

    @staticmethod
    def get_rope_index(tokens: torch.Tensor, kinds: torch.Tensor, *grids, **_) -> tuple[torch.Tensor, None]:
        """Places repeat and go back, one axis each; int64 [3, B, S]."""
        axes = [torch.arange(tokens.shape[1]) // d % 7 for d in (1, 2, 5)]
        return torch.stack(axes)[:, None].expand(-1, len(tokens), -1), None


# It stands in the place of Bridge's class, which is known by this name.
QwenLike.__module__, QwenLike.__qualname__ = "megatron.bridge.models.qwen_vl.modeling_qwen25_vl", "Qwen25VLModel"


@dataclass
class _Visual:
    """Stands where Megatron-Bridge's ``GenericVisualInputs`` does."""

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values_videos: torch.Tensor
    video_grid_thw: torch.Tensor

    def normalized_for_model(self) -> dict[str, torch.Tensor]:
        """All fields."""
        return vars(self)


def put_media(batch: dict, start: int) -> None:
    """Write a clip and a picture into every row of a batch; one visual position carries a loss."""
    tokens, mask = batch["tokens"], batch["loss_mask"]
    tokens[tokens >= IMAGE_TOKEN] = 1
    generator = torch.Generator().manual_seed(start)
    visual = {}
    for token, names, grid, place in (
        (VIDEO_TOKEN, ("pixel_values_videos", "video_grid_thw"), CLIP, CLIP_START),
        (IMAGE_TOKEN, ("pixel_values", "image_grid_thw"), PICTURE, PICTURE_START),
    ):
        count = grid[0] * grid[1] * grid[2]
        tokens[:, place : place + count] = token
        mask[:, place : place + count] = 0
        patches = torch.randn(len(tokens), count * MERGE**2, 6, generator=generator)
        in_patches = torch.tensor([grid[0], grid[1] * MERGE, grid[2] * MERGE])
        visual |= {names[0]: patches.flatten(0, 1), names[1]: in_patches.expand(len(tokens), -1)}
    mask[0, CLIP_START + 9] = 1
    batch["position_ids"] = QwenLike.get_rope_index(tokens, tokens)[0]
    batch["visual_inputs"] = _Visual(**visual)
