"""Rules about the training run: its layout, batches, teacher and kernels."""

from __future__ import annotations

from typing import Any

from regate_megatron.config import STUDENT_AS_TEACHER, flag
from regate_megatron.support.alignment import experts_span_replicas
from regate_megatron.support.setting import Rule, Setting, field, first_field

_PACKING_FLAGS = ("sft", "dataloader_inter_document_masking", "use_packed_sequence")


def _several_lengths(setting: Setting) -> Any:
    stages, experts = setting.model.pipeline_model_parallel_size, experts_span_replicas(setting.model)
    if setting.config.budget == "uniform" or not (stages > 1 or experts):
        return None
    ranks = getattr(setting.model, "expert_model_parallel_size", 1)
    experts = f"{ranks} ranks that share experts" if ranks > 1 else "experts cut over several replicas"
    where = f"{stages} pipeline stages" if stages > 1 else experts
    return f"{setting.config.budget} with {where}"


def _cuda_graphs(setting: Setting) -> Any:
    implementation = getattr(setting.model, "cuda_graph_impl", "none")
    if implementation not in (None, "none"):
        return f"cuda_graph_impl={implementation}"
    return next(
        (f"{n}=True" for n in ("enable_cuda_graph", "external_cuda_graph") if getattr(setting.model, n, 0)), None
    )


def _packed_rows(setting: Setting) -> Any:
    """Forms of packing that cannot be exact, or that Megatron itself cannot run."""
    packs = next((name for name in _PACKING_FLAGS if setting.arg(name)), None)
    if setting.arg("hybrid_context_parallel"):
        return "--hybrid-context-parallel"
    if packs is None:
        return None
    if setting.model.pipeline_model_parallel_size > 1 and setting.micro_batch_size > 1:
        return f"--{packs.replace('_', '-')} with pipeline stages and micro-batch size {setting.micro_batch_size}"
    if packs == "dataloader_inter_document_masking" and setting.model.context_parallel_size > 1:
        return "--dataloader-inter-document-masking with context parallelism"
    if setting.model.apply_rope_fusion:
        return f"--{packs.replace('_', '-')} with fused RoPE"
    return None


def _no_pictures(setting: Setting) -> Any:
    ratio = setting.config.visual_keep_ratio
    return None if ratio == 1.0 or setting.is_multimodal else f"{ratio:g} for a language model by itself"


def _adapters_in_teacher(setting: Setting) -> Any:
    takes_student = setting.config.needs_teacher and setting.config.teacher_load == STUDENT_AS_TEACHER
    return "student, which has adapters" if takes_student and setting.arg("peft") else None


def _fsdp(setting: Setting) -> Any:
    names = ("use_megatron_fsdp", "use_torch_fsdp2")
    return next((f"--{name.replace('_', '-')}" for name in names if setting.arg(name)), None)


def _fused_rope(setting: Setting) -> Any:
    rows = setting.micro_batch_size
    return f"fused RoPE with micro-batch size {rows}" if setting.model.apply_rope_fusion and rows > 1 else None


TRAINING_RULES = (
    Rule(
        flag("budget"),
        _several_lengths,
        "uniform with pipeline stages or expert parallelism",
        "it to uniform",
        "pipeline shapes and expert exchanges need one length",
    ),
    Rule(
        flag("visual_keep_ratio"),
        _no_pictures,
        "less than 1 where the model reads images or video",
        "it to 1, or the model",
        "there is no visual position to leave out",
        in_flags=False,
    ),
    Rule("FP4", field("fp4"), "bf16 or FP8 in this version", "the precision flags", "lengths are not aligned for it"),
    Rule(
        "attention masks per document with a teacher",
        lambda s: "--reset-attention-mask" if s.config.needs_teacher and s.arg("reset_attention_mask") else None,
        "rows read as a whole, or a score without teacher (student, random)",
        "the command: leave --reset-attention-mask out",
        "the teacher would read across documents",
    ),
    Rule(
        "activation offloading",
        first_field("cpu_offloading", "fine_grained_activation_offloading"),
        "activations that stay on the device, recomputed or not",
        "the command: leave it out",
        "needs a GPU to be tried",
    ),
    Rule("CUDA graphs", _cuda_graphs, "none", "--cuda-graph-impl to none", "lengths change between steps"),
    Rule(
        "combined 1F1B",
        field("overlap_moe_expert_parallel_comm"),
        "the plain schedules",
        "the command: leave --overlap-moe-expert-parallel-comm out",
        "preprocessing runs after the plan has gone",
    ),
    Rule(
        "tensor-parallel communication overlap",
        field("tp_comm_overlap"),
        "off",
        "the command: leave --tp-comm-overlap out",
        "its user buffers have a fixed size",
    ),
    Rule(
        "packed rows",
        _packed_rows,
        "--sft, --dataloader-inter-document-masking without context parallelism, --use-packed-sequence; unfused RoPE, "
        "and with pipeline stages one row per microbatch",
        "the command: leave the flag out, or add --no-rope-fusion",
        "the kernels would read other positions or segments",
        in_flags=False,
    ),
    Rule(
        flag("teacher_load"),
        _adapters_in_teacher,
        "a checkpoint of the base language model where the student has adapters (peft)",
        "it to that checkpoint",
        "the student's weights have other names",
        in_flags=False,
    ),
    Rule(
        "loss scaled per turn",
        lambda s: "--use-loss-scaling" if s.arg("use_loss_scaling") else None,
        "the mean over tokens",
        "the command: leave --use-loss-scaling out",
        "it finds turns by runs of the loss mask, which elision cuts",
        in_flags=False,
    ),
    Rule(
        "fully sharded data parallel",
        _fsdp,
        "Megatron's DDP",
        "the command: leave the flag out",
        "it gathers weights around module calls, and the decoder is called by ranges of layers",
    ),
    Rule(
        "fused RoPE",
        _fused_rope,
        "micro-batch size 1, or unfused RoPE",
        "the command: add --no-rope-fusion",
        "the fused kernel takes one row of positions",
        in_flags=False,
    ),
)
