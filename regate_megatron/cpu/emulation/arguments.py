"""A cluster's Megatron-LM command line, made fit for a CPU."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import util

# Options that get this value whatever was given.
VALUES = {
    "--transformer-impl": "local",  # Transformer Engine needs a GPU
    "--distributed-backend": "gloo",
    "--attention-backend": "unfused",
}
# Switches that are added unless given.
SWITCHES = (
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-rope-fusion",
)
# What is taken out, by the reason. An option goes together with all that Megatron's validation asks it for: a row holds
# both. NAME=VALUE takes one value (of a list) out; a name that ends in * stands for all of Megatron's that begin so.
_FASTER = "it only chooses a faster kernel or transport"
_GPU = "it needs a GPU, or Transformer Engine"
TAKEN_OUT = {
    _FASTER: """--cross-entropy-fusion-impl --cuda-graph-* --enable-cuda-graph --external-cuda-graph
        --flash-attention-version --fused-residual-rmsnorm --high-priority-stream-groups --mla-down-proj-fusion
        --moe-grouped-gemm --recompute-modules=moe_act --moe-permute-fusion --moe-router-fusion
        --nccl-communicator-config-path --optimizer-cuda-graph --pipeline-model-parallel-comm-backend
        --sharp-enabled-group --tp-comm-overlap* --decoder-tp-comm-overlap --use-flash-attn --use-nccl-ub
        --use-ring-exchange-p2p --use-sharp
        --use-transformer-engine-op-fuser --disable-symmetric-registration
        --use-te-activation-func --te-rng-tracker --inference-rng-tracker --delay-wgrad-compute
        --moe-mlp-glu-interleave-size --moe-shared-expert-overlap
        --overlap-dispatch-backward-with-experts-wgrad --moe-single-grouped-weight --moe-single-grouped-bias
        --moe-use-grouped-tensor""",
    _GPU: """--use-te --apply-layernorm-1p --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype
        --exp-avg-dtype --exp-avg-sq-dtype --optimizer-cpu-offload --optimizer-offload-fraction
        --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d
        --no-pin-cpu-grads --no-pin-cpu-params --log-max-attention-logit --qk-clip*
        --fine-grained-activation-offloading --offload-modules --moe-token-dispatcher-type=flex
        --moe-enable-deepep --symmetric-ar-type --position-embedding-type=relative --moe-flex-dispatcher-backend
        --batch-invariant-mode --batch-invariant-backend --gpu-sniff-test-interval --record-memory-history
        --memory-snapshot-path""",
}
# Options in these rows that scripts add to Megatron's parser: pretrain_vlm.py's and examples/multimodal's.
OF_SCRIPTS = frozenset({"--decoder-tp-comm-overlap", "--use-te"})
# The same for what an absent package does.
OF_PACKAGES = {
    "emerging_optimizers": "--optimizer=muon --optimizer=dist_muon --optimizer=adaptive_muon --optimizer=soap "
    "--optimizer=lion --muon-*",
    "nvidia_resiliency_ext": "--enable-ft-package --calc-ft-timeouts",
}
# FP8 and FP4, and what stands on them: no CPU has them. For who may train in another precision (a dry run does).
PRECISION = {
    "no CPU computes in FP8 or FP4; the precision beside it is taken": """--fp8* --fp4* --first-last-layers-bf16
        --num-layers-at-* --reuse-grad-buf-for-mxfp8-param-ag --moe-router-padding-for-* --keep-fp8-*
        --disable-fp8-* --te-precision-config-file""",
}


def adjust_arguments(argv: list[str]) -> list[str]:
    """Return ``argv`` (a Megatron-LM script's options) with what a CPU needs; ``argv`` itself is left alone.

    Only options that the importable Megatron's own parser knows are added. Precision options stay as given: bf16 works
    on a CPU, fp8 does not. Settings inside a ``--yaml-cfg`` file are out of reach. Call it after ``install()``.
    """
    known = options_of_megatron()
    result, _ = take_out(argv, what_goes(), known)
    result = without(result, VALUES, known)
    result += [switch for switch in SWITCHES if switch in known and switch not in result]
    for name, value in VALUES.items():
        if name in known:
            result += [name, value]
    return result


def options_of_megatron() -> dict[str, argparse.Action]:
    """The options of the importable Megatron's parser, by name."""
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions


def what_goes() -> dict[str, str]:
    """Reason -> options, of all that this machine takes out of a line."""
    absent = {f"{name} is not installed here": names for name, names in OF_PACKAGES.items() if not util.find_spec(name)}
    return TAKEN_OUT | absent


def take_out(
    argv: Iterable[str], rows: Mapping[str, str], known: Mapping[str, argparse.Action]
) -> tuple[list[str], dict[str, list[str]]]:
    """``argv`` less what the rows name (see ``TAKEN_OUT``), and what went, by reason."""
    went: dict[str, list[str]] = {}
    kept = list(argv)
    for reason, names in rows.items():
        plain = [name for name in names.split() if "=" not in name]
        values = [name.split("=") for name in names.split() if "=" in name]
        result = []
        for name, words in split(kept, known):
            if (name in known or name in OF_SCRIPTS) and _is_named(name, known, plain):
                went.setdefault(reason, []).append(name)
                continue
            for _, value in (pair for pair in values if pair[0] == name):
                fewer = [word for word in words if word not in (value, f"{name}={value}")]
                if fewer != words:
                    went.setdefault(reason, []).append(f"{name} {value}")
                    words = [] if fewer in ([], [name]) else fewer
            result += words
        kept = result
    return kept, went


def without(argv: Iterable[str], names: Iterable[str], known: Mapping[str, argparse.Action]) -> list[str]:
    """``argv`` less the options ``names`` and their values; NAME* takes all of ``known`` that begin so."""
    names = list(names)
    return [word for name, words in split(list(argv), known) if not _is_named(name, known, names) for word in words]


def _is_named(name: str, known: Mapping[str, argparse.Action], names: Iterable[str]) -> bool:
    aliases = known[name].option_strings if name in known else [name]
    return any(
        one in aliases or (one.endswith("*") and name in known and any(a.startswith(one[:-1]) for a in aliases))
        for one in names
    )


def split(argv: list[str], known: Mapping[str, argparse.Action]) -> Iterator[tuple[str, list[str]]]:
    """The options of a line, each with its words; words before any have no name.

    Options that are not ``known`` are the script's own: their values are the words up to the next option.
    """
    index = 0
    while index < len(argv):
        name, _, value = argv[index].partition("=")
        end = index + 1
        if name.startswith("--"):
            nargs = known[name].nargs if name in known else "*"
            most = {None: 1, "?": 1, "*": math.inf, "+": math.inf}.get(nargs, nargs)
            while not value and most and end < len(argv) and not argv[end].startswith("--"):
                end, most = end + 1, most - 1
        yield name if name.startswith("--") else "", argv[index:end]
        index = end
