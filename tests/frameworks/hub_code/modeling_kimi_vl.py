"""In place of the code that Kimi-VL's folder brings: a small tower behind its classes' names.

Patches lie row by row of the picture; those that become one position are brought together after the tower.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class DeepseekV3Config(PretrainedConfig):
    model_type = "deepseek_v3"


class MoonViTConfig(PretrainedConfig):
    model_type = "moonvit"

    def __init__(self, patch_size=14, hidden_size=32, merge_kernel_size=(2, 2), **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.hidden_size, self.merge_kernel_size = patch_size, hidden_size, merge_kernel_size


class KimiVLConfig(PretrainedConfig):
    model_type = "kimi_vl"
    sub_configs = {"vision_config": MoonViTConfig, "text_config": DeepseekV3Config}

    def __init__(self, vision_config=None, text_config=None, media_placeholder_token_id=163605, **kwargs):
        self.vision_config = MoonViTConfig(**vision_config or {})
        self.text_config = DeepseekV3Config(**text_config or {})
        self.media_placeholder_token_id = media_placeholder_token_id
        super().__init__(**kwargs)


class MoonVitPretrainedModel(PreTrainedModel):
    config_class = MoonViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values, grid_hws):
        """[patches, 3, side, side] -> of each picture [N, patches of a position, D]."""
        high, wide = self.config.merge_kernel_size
        of_pictures = self.embed(pixel_values).flatten(1).split(grid_hws.prod(dim=1).tolist())
        return [
            one.view(rows // high, high, columns // wide, wide, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            for one, (rows, columns) in zip(of_pictures, grid_hws.tolist(), strict=True)
        ]


class KimiVLMultiModalProjector(nn.Module):
    def __init__(self, config):
        super().__init__()
        high, wide = config.vision_config.merge_kernel_size
        self.linear = nn.Linear(high * wide * config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, image_features):
        return self.linear(torch.cat(image_features).flatten(1))


class KimiVLForConditionalGeneration:
    def _extract_image_features(self, pixel_values, image_grid_hws):
        return self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_hws))

    def _merge_with_image_features(self, inputs_embeds, input_ids, image_features):
        is_placeholder = (input_ids == self.config.media_placeholder_token_id).unsqueeze(-1)
        return inputs_embeds.masked_scatter(is_placeholder, image_features)
