"""The Megatron side of test_extract_teacher.py; one rank on the CPU.

python run_extract_teacher.py save FOLDER   # a tiny LLaVA: FOLDER/llava, and its text part in FOLDER/weights.pt
python run_extract_teacher.py load FOLDER   # a GPT from FOLDER/teacher; fails unless it equals FOLDER/weights.pt
"""

import argparse
import copy
import os
import sys
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()

VOCAB, LENGTH = 64, 32


def main(command: str, folder: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    {"save": save, "load": load}[command](folder)


def save(folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    config = transformer_config()
    model = LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=layer_spec(),
        language_vocab_size=VOCAB,
        language_max_sequence_length=LENGTH,
        vision_transformer_config=vision_config(config),
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=copy.deepcopy(config),
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        language_position_embedding_type="rope",
        img_h=28,
        img_w=28,
        patch_dim=14,
    )
    model.language_model.bfloat16()
    (folder / "llava").mkdir()
    state = {
        "model": model.sharded_state_dict(),
        "iteration": 3,
        "checkpoint_version": 3.0,
        "args": argparse.Namespace(num_layers=config.num_layers, hidden_size=config.hidden_size),
    }
    dist_checkpointing.save(state, str(folder / "llava"))
    torch.save(weights(model.language_model), folder / "weights.pt")


def load(folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel

    from regate_megatron.teacher.weights import find_iteration, load_language_model, open_language_model

    want = torch.load(folder / "weights.pt")
    for how in ("as a teacher", "as a GPT"):
        model = GPTModel(
            config=transformer_config(),
            transformer_layer_spec=layer_spec(),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
        ).bfloat16()
        if how == "as a teacher":
            load_language_model(model, open_language_model(folder / "teacher"))
        else:
            state = dist_checkpointing.load(
                {"model": model.sharded_state_dict()}, str(find_iteration(folder / "teacher")), strict="raise_all"
            )
            assert state["args"].hidden_size == model.config.hidden_size
            model.load_state_dict(state["model"])
        found = weights(model)
        assert found.keys() == want.keys(), f"{how}: {found.keys() ^ want.keys()}"
        different = [name for name in want if not torch.equal(found[name], want[name])]
        assert not different, f"{how}: {different}"
    print(f"{len(want)} tensors are equal")


def weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def transformer_config():
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
    )


def vision_config(language):
    config = copy.deepcopy(language)
    config.num_query_groups, config.gated_linear_unit = config.num_attention_heads, False
    config.vision_model_type = "clip"
    return config


def layer_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    emulation.install()
    main(sys.argv[1], Path(sys.argv[2]))
