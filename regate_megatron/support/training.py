"""Rules about the training run: its layout, batches, teacher and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regate_megatron.compat import adapters_of, is_adapter
from regate_megatron.config import STUDENT_AS_TEACHER, flag
from regate_megatron.support.alignment import gathers_over_replicas
from regate_megatron.support.setting import Fields, Found, Rule, Setting, flag_of, leave_out

_PACKING_FLAGS = ("sft", "dataloader_inter_document_masking", "use_packed_sequence", "packing_buffer_size")


def _several_lengths(setting: Setting) -> Any:
    budget = setting.config.budget
    if budget in ("uniform", "dealt") or not gathers_over_replicas(setting.model):
        return None
    return f"{budget} with {setting.model.moe_token_dispatcher_type} dispatch over several replicas"


def has_graphs(model: Any) -> bool:
    """Whether a model's config, or Megatron's flags, ask for CUDA graphs, by their present or their old names."""
    names = ("enable_cuda_graph", "external_cuda_graph")
    return getattr(model, "cuda_graph_impl", None) not in (None, "none") or any(getattr(model, n, False) for n in names)


def _cuda_graphs(setting: Setting) -> Any:
    """Graphs that are no layer's; the whole step's is a scope of "local" in core 0.17, and under names of that time."""
    implementation = getattr(setting.model, "cuda_graph_impl", None)
    if implementation not in (None, "none", "local", "transformer_engine"):
        return f"cuda_graph_impl={implementation}"
    if has_graphs(setting.model) and "full_iteration" in _scopes(setting.model):
        return Found("full_iteration in cuda_graph_scope", "the command: leave it out of --cuda-graph-scope")
    return None


def _scopes(model: Any) -> Iterator[str]:
    for name in ("cuda_graph_scope", "cuda_graph_scope_deprecated", "cuda_graph_modules"):
        given = getattr(model, name, None) or []
        given = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
        yield from (getattr(one, "name", one) for one in given)


def _packed_rows(setting: Setting) -> Any:
    """Forms of packing that cannot be exact, or that Megatron itself cannot run."""
    names = [name for name in _PACKING_FLAGS if setting.megatron_flag(name)]
    packs = flag_of(names[0]) if names else None
    if setting.megatron_flag("hybrid_context_parallel"):
        return Found("--hybrid-context-parallel", leave_out(setting, "hybrid_context_parallel"))
    if packs is None:
        return None
    out = f"leave {packs} out"
    if setting.model.pipeline_model_parallel_size > 1 and setting.micro_batch_size > 1:
        given = f"{packs} with pipeline stages and micro-batch size {setting.micro_batch_size}"
        return Found(given, f"--micro-batch-size or --pipeline-model-parallel-size to 1, or {out}")
    if "dataloader_inter_document_masking" in names and setting.model.context_parallel_size > 1:
        given = "--dataloader-inter-document-masking with context parallelism"
        return Found(given, "--context-parallel-size to 1, or leave --dataloader-inter-document-masking out")
    cuts = setting.model.context_parallel_size > 1 or setting.model.sequence_parallel
    if "packing_buffer_size" in names and cuts:
        given = "--packing-buffer-size with sequence or context parallelism, where train.py forgets where samples start"
        return Found(
            given, "the command: leave --packing-buffer-size out, or --sequence-parallel and context parallelism"
        )
    return None


def _no_pictures(setting: Setting) -> Any:
    config = setting.config
    if setting.is_multimodal or not config.ranks_visual:
        return None
    ratio = min(config.visual_keep_ratio, config.visual_keep_ratio_end or 1.0)
    return f"{ratio:g} for a language model by itself"


def _adapters_in_teacher(setting: Setting) -> Any:
    if not setting.config.needs_teacher or setting.config.teacher_load != STUDENT_AS_TEACHER:
        return None
    models = [chunk for chunk in setting.chunks if hasattr(chunk, "named_parameters")]
    if not setting.run.switches_adapters and not any(adapters_of(model) for model in models):
        return "student, whose adapters cannot be switched off" if setting.run.has_adapters else None
    for model in models:
        learn = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        if (name := next((name for name in learn if not is_adapter(name)), None)) is not None:
            return f"student, whose {name} learns beside its adapters"
    wrong = [name for name in ("fp8", "fp4") if getattr(setting.model, name, None)]
    words = [one.embedding for one in models if getattr(one, "embedding", None) is not None]
    if setting.model.sequence_parallel and not all(one.scatter_to_sequence_parallel for one in words):
        wrong.append("sequence_parallel that the multimodal model sees to")
    return f"student with adapters, and {wrong[0]}" if wrong else None


def _fsdp(setting: Setting) -> Any:
    found = setting.run.fsdp
    return Found(found, f"the command: leave {found} out") if found else None


def _fused_overlap(setting: Setting) -> Any:
    fuses = getattr(setting.model, "use_transformer_engine_op_fuser", False)
    if not (fuses and getattr(setting.model, "tp_comm_overlap", False)):
        return None
    return Found("tp_comm_overlap=True with use_transformer_engine_op_fuser", leave_out(setting, "tp_comm_overlap"))


TRAINING_RULES = (
    Rule(
        flag("budget"),
        _several_lengths,
        "uniform or dealt where replicas share experts by allgather, or by HybridEP that does not pad uneven inputs",
        "--moe-token-dispatcher-type to alltoall, or --regate-budget to dealt",
        "it takes equally many tokens of every rank",
    ),
    Rule(
        "FP4",
        Fields("fp4"),
        "bf16 or FP8 in this version",
        "the command: leave --fp4-format out",
        "lengths are not aligned for it",
    ),
    Rule(
        flag("visual_keep_ratio"),
        _no_pictures,
        "less than 1 where the model reads images or video",
        "--regate-visual-keep-ratio to 1 (--regate-recipe pictures sets it: leave that out), or the model",
        "there is no visual position to leave out",
        in_flags=False,
    ),
    Rule(
        "attention masks per document with a teacher",
        lambda s: s.run.document_masks if s.config.needs_teacher else None,
        "rows read as a whole, or a score without teacher (student, random)",
        "the command: leave --reset-attention-mask out",
        "the teacher would read across documents",
    ),
    Rule(
        "activation offloading",
        Fields("cpu_offloading", "cpu_offloading_num_layers", "fine_grained_activation_offloading"),
        "activations that stay on the device, recomputed or not",
        "the command: leave its flag out",
        "needs a GPU to be tried",
    ),
    Rule(
        "CUDA graphs",
        _cuda_graphs,
        "graphs of layers and their parts, local or transformer_engine (not tried without a GPU)",
        "--cuda-graph-impl to local or transformer_engine",
        "one graph of a whole step has one length, and nothing switches it off",
    ),
    Rule(
        "combined 1F1B",
        Fields("overlap_moe_expert_parallel_comm"),
        "the plain schedules",
        "the command: leave --overlap-moe-expert-parallel-comm out",
        "preprocessing runs after the plan has gone",
    ),
    Rule(
        "tensor-parallel communication overlap",
        _fused_overlap,
        "by Transformer Engine's layers (not tried without a GPU), not by its fused operations",
        "the command: leave --tp-comm-overlap out, or --use-transformer-engine-op-fuser",
        "user buffers have one size, and there nothing switches them off where sequences are short",
    ),
    Rule(
        "packed rows",
        _packed_rows,
        "--sft, --dataloader-inter-document-masking without context parallelism, --use-packed-sequence, "
        "--packing-buffer-size without sequence and context parallelism; with pipeline stages one row per microbatch",
        "the command: leave the flag out, or set the size named to 1",
        "other segments would be read than the batch has",
    ),
    Rule(
        flag("teacher_load"),
        _adapters_in_teacher,
        "student with adapters where all else of its language model is frozen, without FP8, and with sequence "
        "parallelism where the language model cuts its words itself; or a checkpoint of the base language model",
        "it to that checkpoint",
        "the frozen base, adapters off, must be a model that stays",
    ),
    Rule(
        "loss scaled per turn",
        lambda s: "--use-loss-scaling" if s.megatron_flag("use_loss_scaling") else None,
        "the mean over tokens",
        "the command: leave --use-loss-scaling out",
        "it finds turns by runs of the loss mask, which elision cuts",
    ),
    Rule(
        "fully sharded data parallel",
        _fsdp,
        "Megatron's DDP",
        "the command: leave the flag out",
        "it gathers weights around module calls, and the decoder is called by ranges of layers",
    ),
)


def unproven(setting: Setting) -> list[str]:
    """What a model's config, or Megatron's flags, ask for that no GPU has shown with ReGATE; one line each."""
    model, lines = setting.model, []
    if model.num_moe_experts and model.moe_token_dispatcher_type == "flex":
        backend = getattr(model, "moe_flex_dispatcher_backend", None) or "deepep"
        lines.append(
            f"the flex dispatcher ({backend}) was never run with ReGATE, for want of a GPU: compare a few steps at"
            " --regate-keep-ratio 1 and at your ratio with --moe-token-dispatcher-type alltoall first"
        )
    if getattr(model, "tp_comm_overlap", False):
        lines.append(
            "tp_comm_overlap: on in dense steps and layers, off where sequences are short, as its user buffers have one"
            " size; never run with ReGATE, for want of a GPU: compare a few steps with and without it first"
        )
    if has_graphs(model):
        lines.append(
            "CUDA graphs: on in dense steps, off in sparse ones, as a graph has one length; never run with ReGATE, for"
            " want of a GPU: compare a few steps with and without them first"
        )
    is_several = setting.micro_batch_size > 1 or any(setting.megatron_flag(name) for name in _PACKING_FLAGS)
    if is_several and model.apply_rope_fusion and not model.multi_latent_attention:
        lines.append(
            "fused RoPE: on in dense steps and layers, off where short rows are packed or several in a microbatch, as"
            " its kernels take one row of positions; never run with ReGATE, for want of a GPU: compare a few steps with"
            " --no-rope-fusion"
        )
    return lines


def hints(setting: Setting) -> list[str]:
    """What is allowed, and still worth knowing before step 0; one line each."""
    lines = unproven(setting)
    if setting.model.context_parallel_size > 1 and not getattr(setting.model, "calculate_per_token_loss", False):
        lines.append(
            "context parallelism without --calculate-per-token-loss: each context rank divides its loss by its own"
            " targets (Megatron's rule), so the weight of a target depends on the cut; with the flag it does not"
        )
    elif setting.config.ranks_targets and getattr(setting.model, "calculate_per_token_loss", None) is False:
        lines.append(
            "--calculate-per-token-loss is off: rows keep different numbers of targets, and Megatron's mean per"
            " microbatch gives lone targets more weight; add it (calculate_per_token_loss=True in a model config)"
        )
    budget = setting.config.budget
    if setting.config.share == "batch" and budget in ("uniform", "balanced"):
        lines.append(
            f"{flag('share')} batch with {flag('budget')} {budget}, whose lengths follow other rules: the threshold"
            " says only how much runs in all; with dealt or per-sample every sample runs what it keeps"
        )
    return lines
