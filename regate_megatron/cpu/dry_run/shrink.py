"""What a dry run makes small, and by which rule.

Kept: every parallel size but data parallelism; how layers fall on stages and virtual stages, as far as dense layers and
uneven splits go; whether heads, groups, experts and vocabulary divide; microbatches per pipeline as a remainder of its
stages; precision, recompute, schedules and every switch. Small: whatever only costs time. ``cluster`` is Megatron's
validated namespace of the line as given, so all that must divide there does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HEAD_SIZE = 16
TRAIN_STEPS = 4
FEW_RANKS = 4  # so many run two replicas as fast as one
# Beginnings of flags that a few steps here have no use for, or that name what belongs to the user.
DROPPED = (
    "--train-samples --train-iters --lr-warmup --lr-decay --lr-wsd --rampup-batch-size --step-batch-size --exit-",
    "--save --load --pretrained-checkpoint --finetune --async-save --use-persistent-ckpt --non-persistent",
    "--use-checkpoint-args --exit-on-missing --ckpt-convert --data-cache-path --eval- --full-validation --log-interval",
    "--tensorboard-dir --wandb --profile --inprocess --log-straggler --num-workers --enable-one-logger",
    "--one-logger --nccl --distributed-timeout --check-weight --rerun-mode",
    "--iterations-to-skip --regate-dense-from",
)
DATA = "--data-path --train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path"
TOKENIZER = "--tokenizer-model --vocab-file --merge-file"
REPLACED_WITH_DATA = f"{DATA} {TOKENIZER} --tokenizer --vocab-size --null-tokenizer --split --mock-data --tiktoken"
# Layer counts that follow a list of the user's are left alone.
LAYER_LISTS = ("hybrid_layer_pattern", "pipeline_model_parallel_layout", "heterogeneous_layers_config_path")


@dataclass
class Shrunk:
    """Flags to set, and what to say of them.

    Attributes:
        values: flag -> its new value.
        said: one phrase per change.
    """

    values: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def put(self, flag: str, value: Any, before: Any = None) -> None:
        """Set a flag; say so when it changes something."""
        self.values[flag] = value
        if before is not None and before != value:
            self.said.append(f"{flag.removeprefix('--')} {before} -> {value}")


def dense_group(cluster: Any) -> int:
    """Ranks of one data-parallel replica."""
    return cluster.tensor_model_parallel_size * cluster.pipeline_model_parallel_size * cluster.context_parallel_size


def least_ranks(cluster: Any) -> int:
    """What the number of ranks must be a multiple of."""
    tensor = cluster.tensor_model_parallel_size
    expert_tensor = getattr(cluster, "expert_tensor_parallel_size", None) or tensor
    experts = cluster.expert_model_parallel_size * expert_tensor
    stage = math.lcm(tensor * cluster.context_parallel_size, experts)
    instances = getattr(cluster, "num_distributed_optimizer_instances", 1) or 1
    return math.lcm(stage, tensor * cluster.context_parallel_size * instances) * cluster.pipeline_model_parallel_size


def data_parallel_size(cluster: Any, limit: int) -> int | None:
    """The replicas to run here: the fewest the layout allows (expert parallelism spans several), two of small ones.

    Returns None where not even the fewest possible fit into ``limit`` ranks.
    """
    group = dense_group(cluster)
    fewest = least_ranks(cluster) // group
    two_are_few = fewest == 1 and cluster.world_size >= 2 * group and 2 * group <= min(limit, FEW_RANKS)
    return 2 if two_are_few else fewest if fewest * group <= limit else None


def smaller_layouts(cluster: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Layouts of the same kinds with fewer ranks, the largest size made smaller first: flags, and the ranks then.

    Every size stays two at least. Whether Megatron accepts one is for its own validation to say.
    """
    listed = any(getattr(cluster, name, None) for name in LAYER_LISTS)
    kinds = {
        "pipeline-model": (cluster.pipeline_model_parallel_size, not listed),
        "tensor-model": (cluster.tensor_model_parallel_size, True),
        "context": (cluster.context_parallel_size, not getattr(cluster, "hierarchical_context_parallel_sizes", None)),
        "expert-model": (cluster.expert_model_parallel_size, True),
    }
    for kind, (size, can_change) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        factor = next((n for n in range(2, size) if size % n == 0), None)
        if factor is None or not can_change:
            continue
        flags = {f"--{kind}-parallel-size": size // factor}
        per_chunk = getattr(cluster, "num_layers_per_virtual_pipeline_stage", None)
        if kind == "pipeline-model" and per_chunk:
            flags["--num-layers-per-virtual-pipeline-stage"] = per_chunk * factor  # as many virtual stages as before
        yield flags, cluster.world_size // (1 if kind == "expert-model" else factor)


def weights_gb(values: dict[str, Any], cluster: Any) -> float:
    """What the small model's weights, gradients and optimizer take on a rank, in 10^9 bytes."""
    hidden, layers = values["--hidden-size"], values.get("--num-layers", cluster.num_layers)
    experts = values.get("--num-experts", getattr(cluster, "num_experts", None) or 0)
    per_layer = 12 * hidden**2 + 3 * hidden**2 * experts / cluster.expert_model_parallel_size
    return 24 * per_layer * -(-layers // cluster.pipeline_model_parallel_size) / 1e9


def shrink(
    cluster: Any,
    *,
    replicas: int,
    dense_layers: int,
    is_multimodal: bool,
    fp8_multiple: int,
    keeps_lengths: bool = False,
) -> Shrunk:
    """The changes to the line's numbers; see the module.

    Args:
        keeps_lengths: whether rows are as long as the line says, so that they are a sample of its data.
    """
    small = Shrunk()
    _layers(small, cluster, dense_layers)
    _width(small, cluster)
    _experts(small, cluster)
    if not keeps_lengths:
        _lengths(small, cluster, is_multimodal, fp8_multiple)
    _scales(small, cluster)
    _batch(small, cluster, replicas)
    return small


def _layers(small: Shrunk, cluster: Any, dense_layers: int) -> None:
    listed = any(getattr(cluster, name, None) for name in LAYER_LISTS)
    listed |= any(
        isinstance(getattr(cluster, name, None), list) for name in ("moe_layer_freq", "linear_attention_freq")
    )
    layers = cluster.num_layers
    if listed or getattr(cluster, "decoder_num_layers", None):
        small.said.append(f"num-layers {layers} kept, as its layers are listed one by one")
        return
    stages, virtual = cluster.pipeline_model_parallel_size, cluster.virtual_pipeline_model_parallel_size or 1
    first = getattr(cluster, "decoder_first_pipeline_num_layers", None)
    last = getattr(cluster, "decoder_last_pipeline_num_layers", None)
    needed = max(1, dense_layers)
    if first or last:
        middle = stages - bool(first) - bool(last)
        per_stage = (layers - (first or 0) - (last or 0)) // middle if middle else 0
        per_stage = min(per_stage, virtual * (1 if first else needed))
        total = per_stage * middle
        for flag, given, least in (("first", first, virtual * needed), ("last", last, virtual)):
            if given:
                small.put(f"--decoder-{flag}-pipeline-num-layers", min(given, least), given)
                total += min(given, least)
        small.put("--num-layers", total, layers)
        per_chunk = max(1, per_stage // virtual)
    else:
        extra = bool(getattr(cluster, "account_for_embedding_in_pipeline_split", False))
        extra += bool(getattr(cluster, "account_for_loss_in_pipeline_split", False))
        chunks = stages * virtual
        per_chunk = min((layers + extra) // chunks, needed + (1 if extra or chunks == 1 else 0))
        small.put("--num-layers", per_chunk * chunks - extra, layers)
    if virtual > 1 and not getattr(cluster, "num_virtual_stages_per_pipeline_rank", None):
        small.put("--num-layers-per-virtual-pipeline-stage", per_chunk)
    if getattr(cluster, "recompute_num_layers", None):
        small.put("--recompute-num-layers", 1, cluster.recompute_num_layers)


def _width(small: Shrunk, cluster: Any) -> None:
    tensor, heads = cluster.tensor_model_parallel_size, cluster.num_attention_heads
    grouped = bool(cluster.group_query_attention)
    groups = cluster.num_query_groups if grouped else heads
    few_groups = tensor if groups % tensor == 0 else groups  # fewer groups than tensor ranks are shared among them
    few_groups = max(few_groups, min(groups, 2))
    few_heads = math.lcm(few_groups * min(heads // groups, 2), tensor)
    hidden = few_heads * HEAD_SIZE
    small.put("--num-attention-heads", few_heads, heads)
    if grouped:
        small.put("--num-query-groups", few_groups, groups)
    small.put("--hidden-size", hidden, cluster.hidden_size)
    small.put("--ffn-hidden-size", 2 * hidden, cluster.ffn_hidden_size)
    small.put("--kv-channels", HEAD_SIZE, cluster.kv_channels)
    if cluster.multi_latent_attention:
        for flag, size in (("q-lora-rank", 16), ("kv-lora-rank", 16), ("qk-head-dim", 16), ("v-head-dim", 16)):
            if getattr(cluster, flag.replace("-", "_"), None):
                small.put(f"--{flag}", size)
        small.put("--qk-pos-emb-head-dim", 8)
    sections = getattr(cluster, "mrope_section", None)
    if sections:
        parts = [max(1, part * (HEAD_SIZE // 2) // sum(sections)) for part in sections]
        parts[-1] += HEAD_SIZE // 2 - sum(parts)
        small.put("--mrope-section", " ".join(map(str, parts)))


def _experts(small: Shrunk, cluster: Any) -> None:
    experts = getattr(cluster, "num_experts", None)
    if not experts:
        return
    ranks, hidden = cluster.expert_model_parallel_size, small.values["--hidden-size"]
    if not getattr(cluster, "moe_router_num_groups", None):
        few = ranks * max(min(experts // ranks, 2), -(-cluster.moe_router_topk // ranks))
        small.put("--num-experts", min(few, experts), experts)
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size"):
        if getattr(cluster, name, None):
            small.put("--" + name.replace("_", "-"), hidden, getattr(cluster, name))


def _lengths(small: Shrunk, cluster: Any, is_multimodal: bool, fp8_multiple: int) -> None:
    tensor = cluster.tensor_model_parallel_size if cluster.sequence_parallel else 1
    context = 2 * cluster.context_parallel_size if cluster.context_parallel_size > 1 else 1
    multiple = math.lcm(tensor * context, fp8_multiple * tensor)
    length = multiple * -(-64 // multiple)
    if is_multimodal:
        patch = getattr(cluster, "patch_dim", None) or 14
        small.put("--img-h", 4 * patch)
        small.put("--img-w", 4 * patch)
        small.put("--patch-dim", patch)
        small.put("--dataloader-seq-length", length)
        small.put("--seq-length", length)
        small.put("--max-position-embeddings", 8 * length)
        small.said.append(f"an image to 4x4 patches, its text to {length} tokens")
    else:
        small.put("--seq-length", min(length, cluster.seq_length), cluster.seq_length)
        small.put("--max-position-embeddings", small.values["--seq-length"])


def _scales(small: Shrunk, cluster: Any) -> None:
    small.put("--make-vocab-size-divisible-by", 16)
    if getattr(cluster, "fp16", False):  # the scaler begins far too high and skips steps until it has come down
        small.put("--initial-loss-scale", max(1.0, getattr(cluster, "min_loss_scale", 1.0)))
        if getattr(cluster, "loss_scale", None):
            small.put("--loss-scale", 1.0, cluster.loss_scale)


def _batch(small: Shrunk, cluster: Any, replicas: int) -> None:
    stages, rows = cluster.pipeline_model_parallel_size, min(cluster.micro_batch_size, 2)
    on_cluster = cluster.world_size // dense_group(cluster)
    count = cluster.global_batch_size // (cluster.micro_batch_size * on_cluster)
    few = count if count <= 2 * stages else stages * (2 if count % stages == 0 else 1) + count % stages
    small.put("--micro-batch-size", rows, cluster.micro_batch_size)
    small.put("--global-batch-size", few * rows * replicas, cluster.global_batch_size)
    if getattr(cluster, "microbatch_group_size_per_vp_stage", None):
        small.put("--microbatch-group-size-per-virtual-pipeline-stage", min(stages, few))
