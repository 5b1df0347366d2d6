"""In place of the code that the folders of InternVL 2.5, 3 and 3.5 bring: a small tower behind its classes' names."""

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(self, hidden_size=32, patch_size=14, image_size=448, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.patch_size, self.image_size = hidden_size, patch_size, image_size


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, downsample_ratio=0.5, **kwargs):
        self.vision_config = InternVisionConfig(**vision_config or {})
        llm_config = llm_config or {"model_type": "qwen2"}
        self.llm_config = CONFIG_MAPPING[llm_config["model_type"]](**llm_config)
        self.downsample_ratio, self.select_layer, self.ps_version = downsample_ratio, -1, "v2"
        super().__init__(**kwargs)


class InternVisionModel(PreTrainedModel):
    config_class = InternVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values):
        return self.embed(pixel_values)


class InternVLChatModel:
    def extract_feature(self, pixel_values):
        return self.mlp1(self.pixel_shuffle(self.vision_model(pixel_values), scale_factor=self.downsample_ratio))

    def pixel_shuffle(self, x, scale_factor=0.5):
        """[T, D, height, width] -> [T, N, squares · D]."""
        side = int(1 / scale_factor)
        squares = x.unfold(2, side, side).unfold(3, side, side)  # T, D, rows, columns, side, side
        return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
