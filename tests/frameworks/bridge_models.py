"""Tiny models and data for Megatron-Bridge's own loop: a GPT, and Qwen-VLs whose rows have pictures of noise."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.bridge.data.base import DatasetProvider
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs
from megatron.bridge.data.packing.in_batch import pack_right_padded_sequence_batch_to_mcore_thd
from megatron.bridge.data.packing.parquet import write_packed_parquet
from megatron.bridge.models.glm_vl.glm_45v_provider import GLM45VModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.models.ministral3.ministral3_provider import (
    Ministral3ModelProvider,
    MinistralTEDotProductAttention,
)
from megatron.bridge.models.qwen_vl import Qwen25VLModelProvider, qwen3_vl_provider
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import attention as qwen3_vl_attention
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import model as qwen3_vl_model
from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider, Qwen3VLMoEModelProvider
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tokenizers.text.libraries import NullTokenizer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.nn.functional import pad, silu
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

TEXT, PROMPT, VOCAB, SAMPLES = 24, 8, 128, 64
PACK = 56  # of a row packed offline
TEXT_ALONE = 19  # of a row without a picture
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN = 120, 121, 122
GRID, MERGE = (1, 4, 6), 2
VISUAL = GRID[0] * GRID[1] * GRID[2] // MERGE**2

TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "seq_length": TEXT,
    "vocab_size": VOCAB,
    "transformer_layer_spec": local_layer_spec,
    "share_embeddings_and_output_weights": False,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "cross_entropy_loss_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "pipeline_dtype": torch.float32,
}


def gpt(**layout: Any) -> GPTModelProvider:
    if layout.get("mtp_num_layers"):
        gpt_layer_specs.get_gpt_mtp_block_spec = _local_layers_ahead
    return GPTModelProvider(position_embedding_type="rope", **TINY | layout)


def _local_layers_ahead(*given: Any, use_transformer_engine: bool, **options: Any) -> ModuleSpec:
    return get_gpt_mtp_block_spec(*given, use_transformer_engine=False, **options)


def qwen(**layout: Any) -> Qwen25VLModelProvider:
    vision = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32, patch_size=2, window_size=8
    )
    return Qwen25VLModelProvider(
        num_query_groups=2,
        kv_channels=8,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        mrope_section=[1, 1, 2],
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=START_TOKEN,
        **TINY,
        **layout,
    )


SMALL = {"num_query_groups": 2, "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": silu}
SMALL |= {"add_bias_linear": False, "image_token_id": IMAGE_TOKEN, "bf16": False, "params_dtype": torch.float32}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_grouped_gemm": False}
EXPERTS |= {"moe_permute_fusion": False, "moe_aux_loss_coeff": 0.0}


def glm(**layout: Any) -> GLM45VModelProvider:
    """A dense layer, then experts, as GLM-4.5V has them."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32, "patch_size": 2}
    layers = {"transformer_layer_spec": partial(get_gpt_decoder_block_spec, use_transformer_engine=False)}
    shared = {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": False}
    return GLM45VModelProvider(
        vision_config=Glm4vVisionConfig(depth=1, image_size=16, **sizes),
        kv_channels=16,
        mrope_section=[2, 1, 1],
        moe_layer_freq=[0, 1, 1, 1],
        mtp_num_layers=0,
        **TINY | SMALL | EXPERTS | shared | layers,
        **layout,
    )


def ministral(original_maximum: int = 8, **layout: Any) -> Ministral3ModelProvider:
    """Rows are three times as long as its original maximum, from where on queries are scaled by their place."""
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=2, image_size=16
    )
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": original_maximum}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = Ministral3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, rope_parameters=rope)
    layers = {"transformer_layer_spec": _ministral_layers}
    return Ministral3ModelProvider(
        hf_config=Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN),
        kv_channels=8,
        yarn_rotary_scaling_factor=4.0,
        yarn_original_max_position_embeddings=original_maximum,
        **TINY | SMALL | layers,
        **layout,
    )


def ministral_short(**layout: Any) -> Ministral3ModelProvider:
    """Rows end before the original maximum: past it Bridge counts the places of packed rows through all samples."""
    return ministral(64, **layout)


def _ministral_layers(config: Any) -> ModuleSpec:
    layer = local_layer_spec(config)
    layer.submodules.self_attention.submodules.core_attention = MinistralTEDotProductAttention
    return layer


QWEN3 = {
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": silu,
    "add_bias_linear": False,
    "mrope_section": [2, 1, 1],
    "language_max_sequence_length": TEXT,
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START_TOKEN,
    "freeze_language_model": False,
    "freeze_vision_model": False,
} | {name: value for name, value in TINY.items() if name != "transformer_layer_spec"}


def _qwen3_vision() -> Qwen3VLVisionConfig:
    """Three features of its layers go to the first three layers of the decoder."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32, "patch_size": 2}
    return Qwen3VLVisionConfig(depth=4, deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=16, **sizes)


def qwen3(**layout: Any) -> Qwen3VLModelProvider:
    without_engine(layout.get("context_parallel_size", 1))
    return Qwen3VLModelProvider(vision_config=_qwen3_vision(), **QWEN3, **layout)


def qwen3_moe(**layout: Any) -> Qwen3VLMoEModelProvider:
    without_engine(layout.get("context_parallel_size", 1))
    routing = {"moe_router_load_balancing_type": "aux_loss"}
    return Qwen3VLMoEModelProvider(vision_config=_qwen3_vision(), **QWEN3, **EXPERTS, **routing, **layout)


def without_engine(context_ranks: int = 1) -> None:
    """Qwen3-VL asks for Transformer Engine's layers by name: give it Megatron's own, which run on a CPU.

    Where it is not Transformer Engine's, it takes an attention of its own, for whole rows: not over context ranks.
    """
    if context_ranks > 1:
        qwen3_vl_attention.DotProductAttention = type("NoAttentionAtAll", (), {})
    qwen3_vl_provider.get_gpt_layer_with_transformer_engine_spec = _local_layer
    qwen3_vl_model.get_vit_layer_with_transformer_engine_spec = get_vit_layer_with_local_spec
    qwen3_vl_model.TENorm = WrappedTorchNorm
    qwen3_vl_model.TEColumnParallelLinear = ColumnParallelLinear
    qwen3_vl_model.TERowParallelLinear = RowParallelLinear


def _local_layer(*, num_experts: int | None, qk_layernorm: bool, **_: Any) -> ModuleSpec:
    return get_gpt_layer_local_spec(
        num_experts=num_experts, moe_grouped_gemm=False, qk_layernorm=qk_layernorm, normalization="RMSNorm"
    )


class Rows(torch.utils.data.Dataset):
    """A prompt without loss, then an answer to learn; the same rows for every size and rank."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % SAMPLES)
        text = torch.randint(1, 100, (TEXT + 1,), generator=generator)
        mask = torch.ones(TEXT)
        mask[:PROMPT] = 0
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask, "position_ids": torch.arange(TEXT)}


class PackedRows(Rows):
    """The same rows, packed (``enable_in_batch_packing``)."""

    @staticmethod
    def collate_fn(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch["attention_mask"] = torch.ones_like(batch["tokens"])
        pack_right_padded_sequence_batch_to_mcore_thd(batch)
        return batch


def offline_rows(folder: Path, multiple: int, **loading: Any) -> GPTSFTDatasetConfig:
    """The same rows in Bridge's own format of rows packed offline: two samples in one, one in the next, and so on.

    Each sample is filled up to a multiple of ``multiple`` positions, each row to ``PACK``.
    """
    end, fill, packs, rows = VOCAB - 1, -TEXT % multiple, [], Rows(SAMPLES)
    NullTokenizer.eos_id = end  # which Megatron's has no name for
    left = iter(rows[index] for index in range(SAMPLES))
    for count in itertools.cycle((2, 1)):
        samples = list(itertools.islice(left, count))
        if len(samples) < count:
            break
        tokens = [[*one["tokens"].tolist(), int(one["labels"][-1]), *[end] * fill] for one in samples]
        masks = [[*one["loss_mask"].int().tolist(), 0, *[0] * fill] for one in samples]
        starts = [0, *itertools.accumulate(map(len, tokens))][:-1]
        packs.append({"input_ids": sum(tokens, []), "seq_start_id": starts, "loss_mask": sum(masks, [])})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rows{os.environ['RANK']}.idx.parquet"
    write_packed_parquet(packs, file)
    return GPTSFTDatasetConfig(
        seq_length=PACK,
        dataset_root=folder,
        enable_offline_packing=True,
        offline_packing_specs=PackedSequenceSpecs(
            packed_sequence_size=PACK,
            packed_train_data_path=str(file),
            packed_val_data_path=str(file),
            pad_seq_to_mult=multiple,
        ),
        dataset_kwargs={"pad_to_max_length": True},
        do_test=False,
        **loading,
    )


class PictureRows(Rows):
    """Every second row: a picture and a caption; the others: a caption alone, padded."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % SAMPLES)
        tokens, mask = torch.randint(1, 100, (TEXT,), generator=generator), torch.zeros(TEXT)
        row = {"input_ids": tokens, "loss_mask": mask, "position_ids": torch.arange(TEXT)}
        if index % 2 == 0:
            tokens[1], tokens[2 : 2 + VISUAL] = START_TOKEN, IMAGE_TOKEN
            mask[3 + VISUAL : -1] = 1
            row["pixels"] = torch.randn(GRID[0] * GRID[1] * GRID[2], 3 * 2 * 2 * 2, generator=generator)
        else:
            tokens[TEXT_ALONE:] = 0
            mask[2:18] = 1
        row["labels"] = pad(tokens[1:], (0, 1), value=-100).masked_fill(mask == 0, -100)
        return row

    @classmethod
    def collate_fn(cls, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """What Bridge's collators make: placeholders written out, pixels and grids in one object."""
        pixels = [row["pixels"] for row in rows if "pixels" in row]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "pixels"}
        return dict(batch, visual_inputs=GenericVisualInputs(**cls.visual(pixels, batch) if pixels else {}))

    @staticmethod
    def visual(pixels: list[torch.Tensor], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The fields of the object that there are."""
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([[GRID]] * len(pixels))}


class MediaRows(PictureRows):
    """Two pictures of different sizes in one row, a clip in the next, as Qwen2.5-VL has it: with seconds per frame."""

    seconds: float | None = 0.5
    clip = [START_TOKEN, *[VIDEO_TOKEN] * 8, 7, 8]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens, mask = torch.randint(1, 100, (TEXT,), generator=generator), torch.ones(TEXT)
        pictures = [5, START_TOKEN, *[IMAGE_TOKEN] * 6, 6, START_TOKEN, *[IMAGE_TOKEN] * 4]
        start = torch.tensor(self.clip if index % 2 else pictures)
        tokens[: len(start)], mask[: len(start)], mask[-1] = start, 0, 0
        row = {"input_ids": tokens, "loss_mask": mask, "position_ids": torch.arange(TEXT)}
        row["labels"] = pad(tokens[1:], (0, 1), value=-100).masked_fill(mask == 0, -100)
        return row | {"pixels": torch.randn(32 if index % 2 else 24 + 16, 3 * 2 * 2 * 2, generator=generator)}

    @classmethod
    def collate_fn(cls, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "pixels"}
        pictures, clip = (row["pixels"] for row in rows)
        seconds = {} if cls.seconds is None else {"second_per_grid_ts": torch.tensor([cls.seconds])}
        visual = GenericVisualInputs(
            pixel_values=pictures,
            image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 4]]),
            pixel_values_videos=clip,
            video_grid_thw=torch.tensor([[2, 4, 4]]),
            **seconds,
        )
        return dict(batch, visual_inputs=visual)


class TimedMediaRows(MediaRows):
    """The same as Qwen3-VL has it: every frame of the clip behind a text with its time."""

    seconds = None
    clip = [31, START_TOKEN, *[VIDEO_TOKEN] * 4, 32, START_TOKEN, *[VIDEO_TOKEN] * 4]


class PackedPictureRows(PictureRows):
    """The same rows, packed as Bridge's collators pack them (``enable_in_batch_packing``)."""

    multiple = 1
    aligned: ClassVar[dict[str, int]] = {}

    @classmethod
    def collate_fn(cls, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = super().collate_fn(rows)
        length_B = torch.tensor([TEXT if "pixels" in row else TEXT_ALONE for row in rows])
        batch["attention_mask"] = (torch.arange(TEXT) < length_B[:, None]).long()
        pack_right_padded_sequence_batch_to_mcore_thd(
            batch, pad_to_multiple_of=cls.multiple, sequence_tensor_pad_values=cls.aligned
        )
        return batch


class UnevenPictureRows(PackedPictureRows):
    """The same with captions that end early in the rows that the first of two ranks reads."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        if index // 2 % 2 == 0:
            row["loss_mask"][12:], row["labels"][12:] = 0, -100
        return row


class FilledPictureRows(PackedPictureRows):
    """Every sample filled up to a multiple, as tensor and context parallelism ask for."""

    multiple = 4


def in_two_parts(tokens: torch.Tensor) -> None:
    """The placeholders of a row's picture, with a token of text between them."""
    tokens[2 + VISUAL // 2], tokens[2 + VISUAL] = 7, IMAGE_TOKEN


class GlmRows(PictureRows):
    """As GLM-4.5V's: every other medium is a video of two frames, whose placeholders are pictures' too, and the batch
    says which is which. Its model takes no batch with both."""

    kind, frames = "mm_token_type_ids", (2, 2, 6)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        if index % 4 == 2:
            in_two_parts(row["input_ids"])
        return row | {self.kind: (row["input_ids"] == IMAGE_TOKEN).long() * (1 + index % 4 // 2)}

    @classmethod
    def collate_fn(cls, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = super().collate_fn(rows)
        setattr(batch["visual_inputs"], cls.kind, batch.pop(cls.kind))
        return batch

    @classmethod
    def visual(cls, pixels: list[torch.Tensor], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if int(batch[cls.kind].max()) == 1:
            return super().visual(pixels, batch)
        return {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor([cls.frames] * len(pixels))}


class PackedGlmRows(GlmRows, PackedPictureRows):
    """The same rows, packed."""

    aligned: ClassVar[dict[str, int]] = {GlmRows.kind: 0}


class FilledGlmRows(PackedGlmRows):
    """Every sample filled up to a multiple."""

    multiple = 4


class MinistralRows(PictureRows):
    """As Ministral 3's: pictures of 8 by 12 pixels in a square, with their sizes, and a token at the end of a line."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        if "pixels" in row:
            in_two_parts(row["input_ids"])
        return row

    @staticmethod
    def visual(pixels: list[torch.Tensor], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        square = torch.stack([pad(one.flatten()[: 3 * 8 * 12].view(3, 8, 12), (0, 0, 0, 4)) for one in pixels])
        return {"pixel_values": square, "image_sizes": torch.tensor([[8, 12]] * len(pixels))}


class PackedMinistralRows(MinistralRows, PackedPictureRows):
    """The same rows, packed."""


class FilledMinistralRows(PackedMinistralRows):
    """Every sample filled up to a multiple."""

    multiple = 4


@dataclass(kw_only=True)
class Data(DatasetProvider):
    """Bridge's contract for a dataset of one's own."""

    rows: type[Rows]
    seq_length: int = TEXT
    skip_getting_attention_mask_from_dataset: bool = True
    enable_in_batch_packing: bool = False

    def build_datasets(self, context):
        return self.rows(context.train_samples), self.rows(context.valid_samples), None
