"""In place of the code that Kimi-K2.5's folder brings: a small tower behind its classes' names.

Patches lie row by row of the picture; those that become one position are brought together after the tower.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class DeepseekV3Config(PretrainedConfig):
    model_type = "kimi_k2"

    def __init__(self, max_position_embeddings=4096, rope_theta=10000.0, **kwargs):
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        super().__init__(**kwargs)


class KimiK25VisionConfig(PretrainedConfig):
    model_type = "kimi_k25_vision"

    def __init__(self, patch_size=14, vt_hidden_size=32, text_hidden_size=32, merge_kernel_size=(2, 2), **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.merge_kernel_size = patch_size, merge_kernel_size
        self.vt_hidden_size, self.text_hidden_size = vt_hidden_size, text_hidden_size
        self.mm_projector_type = "patchmerger"


class KimiK25Config(PretrainedConfig):
    model_type = "kimi_k25"
    sub_configs = {"vision_config": KimiK25VisionConfig, "text_config": DeepseekV3Config}

    def __init__(self, vision_config=None, text_config=None, media_placeholder_token_id=163605, **kwargs):
        self.vision_config = KimiK25VisionConfig(**vision_config or {})
        self.text_config = DeepseekV3Config(**text_config or {})
        self.media_placeholder_token_id = media_placeholder_token_id
        super().__init__(**kwargs)


class VisionTowerConfig(PretrainedConfig):
    model_type = "moonvit3d"

    def __init__(self, config=None, **kwargs):
        super().__init__(**kwargs)
        config = config or KimiK25VisionConfig()
        self.patch_size, self.hidden_size = config.patch_size, config.vt_hidden_size
        self.merge_kernel_size = config.merge_kernel_size


class ProjectorConfig:
    def __init__(self, config):
        high, wide = config.merge_kernel_size
        self.sizes = high * wide * config.vt_hidden_size, config.text_hidden_size


class MoonViT3dPretrainedModel(PreTrainedModel):
    config_class = VisionTowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values, grid_thws):
        """[patches, 3, side, side] of pictures of one frame -> of each [N, patches of a position, D]."""
        high, wide = self.config.merge_kernel_size
        of_pictures = self.embed(pixel_values).flatten(1).split(grid_thws.prod(dim=1).tolist())
        return [
            one.view(rows // high, high, columns // wide, wide, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            for one, (_, rows, columns) in zip(of_pictures, grid_thws.tolist(), strict=True)
        ]


class PatchMergerMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(*config.sizes)

    def forward(self, image_features):
        return [self.linear(one.flatten(1)) for one in image_features]


class KimiK25ForConditionalGeneration:
    def _extract_image_features(self, pixel_values, grid_thws):
        return self.vision_tower(pixel_values, grid_thws)
