"""Worker of test_qwen_vl: a tiny Qwen2.5-VL of Megatron-Bridge, batches in its layout, through attach; CPU, one rank.

torchrun --nproc-per-node 1 tests/frameworks/run_qwen_vl.py RESULTS.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from tests.frameworks import bridge_on_cpu

bridge_on_cpu.install()

import torch
import torch.distributed as dist
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.models.qwen_vl import Qwen25VLModelProvider
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from regate_megatron import ReGateConfig, ReGateError, attach, wrap_forward_backward
from regate_megatron.api import session_of
from regate_megatron.batches import adapter_for

VOCAB, TEXT, IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN = 128, 20, 120, 121, 122
GRID, MERGE = (1, 4, 6), 2
VISUAL = GRID[0] * GRID[1] * GRID[2] // MERGE**2


def build():
    vision = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32, patch_size=2, window_size=8
    )
    provider = Qwen25VLModelProvider(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=64,
        seq_length=TEXT,
        vocab_size=VOCAB,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        share_embeddings_and_output_weights=False,
        mrope_section=[1, 1, 2],
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=START_TOKEN,
        transformer_layer_spec=local_layer_spec,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
    )
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    model.model_type = ModelType.encoder_or_decoder  # get_model sets it
    return model


def batch(seed: int) -> dict:
    """Two rows: a picture and a caption; a caption alone, padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 100, (2, TEXT), generator=generator)
    tokens[0, 1], tokens[0, 2 : 2 + VISUAL] = START_TOKEN, IMAGE_TOKEN
    tokens[1, 15:] = 0
    mask = torch.zeros(2, TEXT)
    mask[0, 3 + VISUAL : -1], mask[1, 2:14] = 1, 1
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100).masked_fill(mask == 0, -100)
    pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], 3 * 2 * 2 * 2, generator=generator)
    return {
        "input_ids": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": torch.arange(TEXT).expand(2, -1),
        "visual_inputs": GenericVisualInputs(pixel_values=pixels, image_grid_thw=torch.tensor([[GRID]])),
    }


def forward_step(iterator, model):
    """What Bridge's ``vlm_step.forward_step`` passes to the model."""
    one = next(iterator)
    output = model(
        input_ids=one["input_ids"],
        position_ids=one["position_ids"],
        attention_mask=None,
        labels=one["labels"],
        loss_mask=one["loss_mask"],
        **one["visual_inputs"].normalized_for_model(),
    )
    mask = one["loss_mask"]

    def loss_func(loss_BS):
        total, count = (loss_BS * mask).sum(), mask.sum().int()
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return output, loss_func


def model_s_own_positions(model, one: dict) -> torch.Tensor:
    """What the language model is given, [3, B, S]."""
    seen = []
    forward = model.language_model.forward
    model.language_model.forward = lambda *args, **kwargs: (
        seen.append(kwargs["position_ids"]) or forward(*args, **kwargs)
    )
    forward_step(iter([one]), model)
    del model.language_model.forward
    return seen[0]


def main(results: str) -> None:
    dist.init_process_group(backend="gloo")
    mpu.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, own = build(), [batch(1), batch(2)]
    facts = adapter_for(model, None).read(own[0])
    found = {
        "positions agree": torch.equal(facts.position_id_BS.permute(2, 0, 1), model_s_own_positions(model, own[0])),
        "targets": facts.is_target_BS.sum(dim=1).tolist(),
        "visual": facts.is_visual_BS.sum(dim=1).tolist(),
        "context": facts.is_context_BS.sum(dim=1).tolist(),
    }
    config = ReGateConfig(warmup_steps=1, cycle_steps=100, dense_steps=0, teacher_load="student")
    try:
        attach([model], config)
    except ReGateError as error:
        found["refused"] = str(error)
    else:
        session, schedule = session_of([model]), wrap_forward_backward(get_forward_backward_func())
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            schedule(
                forward_step_func=forward_step,
                data_iterator=iter(own),
                model=model,
                num_microbatches=2,
                seq_length=TEXT,
                micro_batch_size=2,
                forward_only=False,
            )
        session.commit()
        found["totals"] = dataclasses.asdict(session.totals)
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
