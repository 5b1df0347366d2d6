"""In place of the code that LLaVA-OneVision 1.5's folder brings: a small tower behind its classes' names.

Patches that become one position lie one after the other, as Qwen2-VL's processor, which it uses, lays them.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen3Config


class RiceConfig(PretrainedConfig):
    model_type = "rice_vit"

    def __init__(self, embed_dim=32, patch_size=14, spatial_merge_size=2, text_hidden_size=32, **kwargs):
        super().__init__(**kwargs)
        self.embed_dim, self.patch_size, self.spatial_merge_size = embed_dim, patch_size, spatial_merge_size
        self.text_hidden_size, self.temporal_patch_size, self.in_channels = text_hidden_size, 1, 3


class Llavaonevision1_5Config(PretrainedConfig):
    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": RiceConfig, "text_config": Qwen3Config}

    def __init__(self, vision_config=None, text_config=None, image_token_id=151655, video_token_id=151656, **kwargs):
        self.vision_config = RiceConfig(**vision_config or {})
        self.text_config = Qwen3Config(**text_config or {})
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        super().__init__(**kwargs)


class RiceTransformerPretrainedModel(PreTrainedModel):
    config_class = RiceConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Linear(3 * config.patch_size**2, config.embed_dim)
        self.merger = nn.Linear(config.embed_dim * config.spatial_merge_size**2, config.text_hidden_size)
        self.post_init()

    def forward(self, pixel_values, grid_thw):
        return self.merger(self.embed(pixel_values).unflatten(0, (-1, self.config.spatial_merge_size**2)).flatten(1))
