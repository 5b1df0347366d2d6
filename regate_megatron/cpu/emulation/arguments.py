"""A cluster's Megatron-LM command line, made fit for a CPU."""

from __future__ import annotations

import argparse

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
# Options that only choose a faster kernel or transport: without them the same numbers, slower.
DROPPED = (
    "--cross-entropy-fusion-impl",
    "--cuda-graph-impl",
    "--cuda-graph-modules",
    "--cuda-graph-scope",
    "--enable-cuda-graph",
    "--external-cuda-graph",
    "--flash-attention-version",
    "--fused-residual-rmsnorm",
    "--high-priority-stream-groups",
    "--mla-down-proj-fusion",
    "--moe-grouped-gemm",
    "--moe-permute-fusion",
    "--moe-router-fusion",
    "--nccl-communicator-config-path",
    "--optimizer-cuda-graph",
    "--pipeline-model-parallel-comm-backend",
    "--sharp-enabled-group",
    "--tp-comm-overlap",
    "--tp-comm-overlap-cfg",
    "--use-flash-attn",
    "--use-nccl-ub",
    "--use-ring-exchange-p2p",
    "--use-sharp",
    "--use-transformer-engine-op-fuser",
)


def adjust_arguments(argv: list[str]) -> list[str]:
    """Return ``argv`` (a Megatron-LM script's options) with what a CPU needs; ``argv`` itself is left alone.

    Only options that the importable Megatron's own parser knows are added. Precision options stay as given: bf16 works
    on a CPU, fp8 does not. Settings inside a ``--yaml-cfg`` file are out of reach. Call it after ``install()``.
    """
    from megatron.training.arguments import add_megatron_arguments

    known = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions
    result = _without(argv, {name: known[name] for name in (*DROPPED, *VALUES) if name in known})
    for switch in SWITCHES:
        if switch in known and switch not in result:
            result.append(switch)
    for name, value in VALUES.items():
        if name in known:
            result += [name, value]
    return result


def _without(argv: list[str], actions: dict[str, argparse.Action]) -> list[str]:
    """``argv`` less the given options and their values."""
    result = []
    index = 0
    while index < len(argv):
        word = argv[index]
        index += 1
        name, _, value = word.partition("=")
        if name not in actions:
            result.append(word)
            continue
        nargs = actions[name].nargs
        if value or nargs == 0:
            continue
        limit = {None: 1, "?": 1}.get(nargs, nargs if isinstance(nargs, int) else len(argv))
        while limit > 0 and index < len(argv) and not argv[index].startswith("--"):
            index, limit = index + 1, limit - 1
    return result
