"""Each switch and choice of Megatron's own parser that a cluster's line may have, before and after a CPU's changes.

    python run_taken_out.py [CHECKOUT]

Prints JSON: "unknown", names in the tables that this version does not have; "broken", what Megatron's validation
accepts where Transformer Engine is, and refuses of the changed line.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from unittest import mock

from regate_megatron.cpu import emulation

emulation.set_environment()
sys.path[:0] = sys.argv[1:2]
emulation.install()

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import transformer_config
from megatron.training import arguments

from regate_megatron.cpu.emulation import arguments as ours

PLAIN = """--num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8 --seq-length 64 --save /x
 --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --bf16 --mock-data
 --tokenizer-type NullTokenizer --vocab-size 127 --position-embedding-type rope --swiglu --normalization RMSNorm
 --disable-bias-linear --use-distributed-optimizer --save-interval 5 --overlap-grad-reduce --overlap-param-gather"""
EXPERTS = """--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-grouped-gemm --sequence-parallel
 --moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 64 --tensor-model-parallel-size 2"""
FP8 = "--fp8-format hybrid --fp8-recipe mxfp8 --fp8-param-gather --recompute-granularity selective"
LATENT = "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --use-precision-aware-optimizer"
LINES = f"{PLAIN} {EXPERTS} {FP8}", f"{PLAIN} {LATENT}"
MODULES = "core_attn moe_act layernorm mla_up_proj mlp moe shared_experts".split()

parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
known = parser._option_string_actions
arguments.add_megatron_arguments = lambda _: parser  # building one takes longer than all else
rows = ours.what_goes() | ours.PRECISION


def is_known(name: str) -> bool:
    option, _, value = name.partition("=")
    if option.endswith("*"):
        return any(one.startswith(option[:-1]) for one in known)
    return option in known and (not value or not known[option].choices or value in known[option].choices)


def refusal(flags: list[str], *, on_cluster: bool) -> str | None:
    """What Megatron says against a line."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    sys.argv = ["script.py", *flags]
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        if on_cluster:  # what no machine here has: Transformer Engine of every version
            for module in (arguments, transformer_config):
                for name in {"is_te_min_version", "is_flashinfer_min_version"} & set(vars(module)):
                    stack.enter_context(mock.patch.object(module, name, lambda *args, **kwargs: True))
            stack.enter_context(mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", print))
        try:
            args = arguments.parse_args(ignore_unknown_args=True)
            arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
            arguments.core_transformer_config_from_args(args)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
    return None


def on_a_cpu(flags: list[str]) -> list[str]:
    return ours.adjust_arguments(ours.take_out(flags, rows, known)[0])


def variants() -> list[list[str]]:
    found = [["--recompute-modules", name] for name in MODULES]
    for action in parser._actions:
        if action.nargs == 0 and action.option_strings[-1] != "--help":
            found.append([action.option_strings[-1]])
        elif action.choices and action.option_strings:
            found += [[action.option_strings[-1], str(choice)] for choice in action.choices]
    return found


broken, tried = {}, 0
for line in (text.split() for text in LINES):
    for flags in ([], *variants()):
        if refusal([*line, *flags], on_cluster=True) is None:
            tried += 1
            reason = refusal(on_a_cpu([*line, *flags]), on_cluster=False)
            if reason:
                broken[" ".join(flags)] = reason
tables = ours.TAKEN_OUT | ours.PRECISION | ours.OF_PACKAGES
unknown = [
    name for names in tables.values() for name in names.split() if name not in ours.OF_SCRIPTS and not is_known(name)
]
print(json.dumps({"broken": broken, "unknown": unknown, "tried": tried}))
