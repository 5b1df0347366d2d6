"""The Megatron side of test_convert_hf_teacher.py, on two ranks of the CPU: logits of a GPTModel against transformers.

    torchrun --nproc-per-node 2 tests/tools/run_convert.py CASES.json RESULTS.json

A case: {"hf": DIR, "megatron": DIR, "flags": [Megatron's flags as printed by the tool], "tp": 1, "pp": 1}. Where
"hf" is a vision-language model, it is given text alone.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from regate_megatron.cpu import emulation

emulation.set_environment()
emulation.install()

import torch
import torch.distributed as dist
import transformers
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import parallel_state as mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

from regate_megatron.teacher import build_teacher
from regate_megatron.teacher.weights import find_iteration, load_language_model, open_language_model, saved_arguments

LENGTH = 24
OF_THE_STUDENT = {"rotary_base": 77, "use_rope_scaling": False, "layernorm_epsilon": 0.5}
OF_THE_STUDENT |= {"rotary_seq_len_interpolation_factor": None}


def megatron_arguments(case: dict):
    """The namespace Megatron's own parser makes of the printed flags."""
    size = ["--tensor-model-parallel-size", str(case["tp"]), "--pipeline-model-parallel-size", str(case["pp"])]
    run = ["--micro-batch-size", "1", "--seq-length", str(LENGTH), "--train-iters", "1", "--lr", "0.1"]
    sys.argv[1:] = emulation.adjust_arguments([*case["flags"], *size, *run])
    args = parse_args()
    return validate_args(args) or args


def build(args, vocab_size: int) -> GPTModel:
    model = GPTModel(
        core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size,
        args.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )
    model.model_type = ModelType.encoder_or_decoder
    return model.eval()


@torch.no_grad()
def logits(model, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """[B, S, V] on the last stage."""

    def forward_step(iterator, model):
        positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        return model(tokens_BS, positions, None), lambda output, non_loss_data=True: output

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=tokens_BS.shape[1],
        micro_batch_size=len(tokens_BS),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[0].float() if found else None


def run(case: dict) -> dict:
    args = megatron_arguments(case)
    checkpoint = open_language_model(case["megatron"])
    model = build(args, checkpoint.vocab_size)
    sees = "vision_config" in json.loads((Path(case["hf"]) / "config.json").read_text())
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    reference = kind.from_pretrained(case["hf"], dtype=torch.float32).eval()
    vocab = reference.config.get_text_config().vocab_size
    tokens_BS = torch.randint(1, vocab - 4, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = reference(tokens_BS).logits
    result = {"scale": want.abs().max().item(), "differences": []}
    for how in ("teacher", "megatron"):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        if how == "teacher":
            load_language_model(model, checkpoint)
        else:
            state = {"model": model.sharded_state_dict()}
            model.load_state_dict(dist_checkpointing.load(state, str(find_iteration(case["megatron"])))["model"])
        result["differences"].append(_difference(model, tokens_BS, want))
    result["teacher_of_another_student"] = _difference(teacher_of_another_student(args, checkpoint), tokens_BS, want)
    saved = vars(saved_arguments(checkpoint.path))
    result["arguments"] = [name for name, value in saved.items() if getattr(args, name, value) != value]
    return result


def _difference(model, tokens_BS: torch.Tensor, want_BSV: torch.Tensor) -> float:
    """The largest difference of logits over all ranks."""
    found = logits(model, tokens_BS)
    difference = torch.tensor(0.0)
    if found is not None:
        difference = (found[..., : want_BSV.shape[-1]] - want_BSV).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


def teacher_of_another_student(args, checkpoint) -> GPTModel:
    """A teacher built beside a student of other rotary frequencies and another norm epsilon than its own."""
    student = build(Namespace(**(vars(args) | OF_THE_STUDENT)), checkpoint.vocab_size)
    teacher = build_teacher(student, checkpoint)
    teacher.model_type = ModelType.encoder_or_decoder
    return teacher


def main(cases: str, results: str) -> None:
    dist.init_process_group("gloo")
    done = []
    for case in json.loads(Path(cases).read_text()):
        mpu.initialize_model_parallel(case["tp"], case["pp"])
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        done.append(run(case))
        mpu.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(done))
    emulation.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
