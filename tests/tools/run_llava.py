"""The Megatron side of test_llava.py, on two tensor-parallel ranks of the CPU: logits of a LLaVAModel on images and
text against transformers; then the model is saved as Megatron saves it.

    torchrun --nproc-per-node 2 tests/tools/run_llava.py CASES.json RESULTS.json

A case: {"hf": DIR, "megatron": DIR, "save": DIR}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
import transformers
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import parallel_state as mpu
from megatron.core.activations import quick_gelu
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import get_submodules

from regate_megatron.teacher.weights import find_iteration, saved_arguments

RANKS, TEXT = 2, 12


def config_of(hf, **more) -> TransformerConfig:
    """What tower and language model share: read off transformers' configuration, by hand."""
    return TransformerConfig(
        num_attention_heads=hf.num_attention_heads,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        tensor_model_parallel_size=RANKS,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **more,
    )


def build(hf, vocab_size: int) -> LLaVAModel:
    text, vision = hf.text_config, hf.vision_config
    layers = hf.vision_feature_layer
    language = config_of(
        text,
        num_layers=text.num_hidden_layers,
        num_query_groups=text.num_key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=text.model_type == "qwen2",
    )
    tower = config_of(
        vision,
        num_layers=layers if layers >= 0 else vision.num_hidden_layers + 1 + layers,
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=quick_gelu if vision.hidden_act == "quick_gelu" else torch.nn.functional.gelu,
    )
    tower.vision_model_type = "clip"
    projector = TransformerConfig(
        num_layers=1,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.hidden_size,
        num_attention_heads=2,
        add_bias_linear=hf.multimodal_projector_bias,
        tensor_model_parallel_size=RANKS,
        use_cpu_initialization=True,
    )
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=decoder_model_with_local_default_spec(None, False),
        language_vocab_size=vocab_size,
        language_max_sequence_length=64,
        vision_transformer_config=tower,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=hf.vision_feature_select_strategy == "default",
        vision_projection_config=projector,
        vision_projection_layer_spec=get_submodules(decoder_model_with_local_default_spec(None, False).submodules.mlp),
        parallel_output=False,
        share_embeddings_and_output_weights=text.tie_word_embeddings,
        language_position_embedding_type="rope",
        language_rotary_base=int(text.rope_parameters["rope_theta"]),
        img_h=vision.image_size,
        img_w=vision.image_size,
        patch_dim=vision.patch_size,
    ).eval()


@torch.no_grad()
def run(case: dict) -> dict:
    reference = transformers.LlavaForConditionalGeneration.from_pretrained(case["hf"], dtype=torch.float32).eval()
    hf, saved = reference.config, saved_arguments(find_iteration(case["megatron"]))
    model = build(hf, saved.padded_vocab_size)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(find_iteration(case["megatron"])))
    model.load_state_dict(state["model"])

    generator = torch.Generator().manual_seed(3)
    side = hf.vision_config.image_size
    images_BCHW = torch.randn(2, 3, side, side, generator=generator)
    text_BT = torch.randint(1, hf.text_config.vocab_size - 4, (2, TEXT), generator=generator)
    before, after = text_BT.split([3, TEXT - 3], dim=1)  # the image comes after three tokens
    patches = (side // hf.vision_config.patch_size) ** 2 + (hf.vision_feature_select_strategy == "full")
    ids_BS = torch.cat([before, torch.full((2, patches), hf.image_token_index), after], dim=1)
    want_BSV = reference(input_ids=ids_BS, pixel_values=images_BCHW).logits
    ids_BT = torch.cat([before, torch.full((2, 1), DEFAULT_IMAGE_TOKEN_INDEX), after], dim=1)
    positions_BT = torch.arange(TEXT + 1).expand_as(ids_BT)
    found_BSV, _ = model(images_BCHW, ids_BT, positions_BT, None)
    difference = (found_BSV[..., : want_BSV.shape[-1]] - want_BSV).abs().max()
    images_BCHW = images_BCHW.flip(0)
    other_BSV = reference(input_ids=ids_BS, pixel_values=images_BCHW).logits

    if dist.get_rank() == 0:
        Path(case["save"]).mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "args": saved, "iteration": 1}, case["save"])
    return {
        "scale": want_BSV.abs().max().item(),
        "difference": difference.item(),
        "of_the_image": (other_BSV - want_BSV).abs().max().item(),
    }


def main(cases: str, results: str) -> None:
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(RANKS)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    done = [run(case) for case in json.loads(Path(cases).read_text())]
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(done))
    emulation.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
