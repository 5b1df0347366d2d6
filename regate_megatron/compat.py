"""What is supported, and the only place that knows Megatron's versions and symbols.

:data:`RULES` is one table of refusals; :func:`check_support` walks it before step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from regate_megatron.config import ReGateConfig, flag
from regate_megatron.errors import refuse

MEGATRON_CORE = "0.19 (0.17, 0.18 and 0.20 are not yet run)"


@dataclass(frozen=True)
class Setting:
    """What the rules look at.

    Attributes:
        chunks: this rank's language-model chunks, unwrapped.
        config: ReGATE's settings.
        args: the framework's namespace; None outside Megatron-LM.
        micro_batch_size: rows per microbatch; known for sure at the first step only.
        is_multimodal: whether the language model is part of a larger model.
    """

    chunks: list[Any]
    config: ReGateConfig
    args: Any = None
    micro_batch_size: int = 1
    is_multimodal: bool = False

    @property
    def model(self) -> Any:
        """The transformer config of the language model."""
        return self.chunks[0].config

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument of the framework, ``default`` where it has none."""
        return getattr(self.args, name, default)


@dataclass(frozen=True)
class Rule:
    """One refusal: ``given`` returns what is wrong, or None; ``in_flags``: the command line alone can tell."""

    what: str
    given: Callable[[Setting], Any]
    allowed: str
    change: str
    why: str
    in_flags: bool = True


def _field(name: str, harmless: tuple[Any, ...] = (None, False, 0)) -> Callable[[Setting], Any]:
    def given(setting: Setting) -> Any:
        value = getattr(setting.model, name, None)
        return None if value in harmless else f"{name}={value}"

    return given


def _layers_of_first_chunk(setting: Setting) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    stages = setting.model.pipeline_model_parallel_size
    if stages == 1 and not setting.model.virtual_pipeline_model_parallel_size:
        return setting.model.num_layers
    vp_stage = 0 if setting.model.virtual_pipeline_model_parallel_size else None
    return get_num_layers_to_build(setting.model, vp_stage, 0)


def _too_many_dense_layers(setting: Setting) -> Any:
    dense, layers = setting.config.dense_layers, setting.model.num_layers
    first = _layers_of_first_chunk(setting)
    if dense >= layers:
        return f"{dense} with {layers} decoder layers"
    return f"{dense} with {first} layers in the first pipeline chunk" if dense > first else None


def _model_class(setting: Setting) -> Any:
    names = [type(chunk).__name__ for chunk in setting.chunks]
    return None if all(_is_gpt(chunk) for chunk in setting.chunks) else ", ".join(names)


def _is_gpt(chunk: Any) -> bool:
    from megatron.core.models.gpt import GPTModel

    return isinstance(chunk, GPTModel)


def _fused_rope(setting: Setting) -> Any:
    rows = setting.micro_batch_size
    return f"fused RoPE with micro-batch size {rows}" if setting.model.apply_rope_fusion and rows > 1 else None


def _cuda_graphs(setting: Setting) -> Any:
    implementation = getattr(setting.model, "cuda_graph_impl", "none")
    if implementation not in (None, "none"):
        return f"cuda_graph_impl={implementation}"
    return next(
        (f"{n}=True" for n in ("enable_cuda_graph", "external_cuda_graph") if getattr(setting.model, n, 0)), None
    )


def _several_lengths(setting: Setting) -> Any:
    stages, experts = setting.model.pipeline_model_parallel_size, setting.model.expert_model_parallel_size
    if setting.config.budget == "uniform" or stages == experts == 1:
        return None
    where = f"{stages} pipeline stages" if stages > 1 else f"{experts} ranks that share experts"
    return f"{setting.config.budget} with {where}"


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


_PACKING_FLAGS = ("sft", "dataloader_inter_document_masking", "use_packed_sequence")


def _position_embedding(setting: Setting) -> Any:
    kind = setting.chunks[0].position_embedding_type
    return None if kind in ("rope", "learned_absolute", "none") else kind


def _fsdp(setting: Setting) -> Any:
    names = ("use_megatron_fsdp", "use_torch_fsdp2")
    return next((f"--{name.replace('_', '-')}" for name in names if setting.arg(name)), None)


RULES = (
    Rule(
        "model",
        _model_class,
        "GPTModel, alone or in a LLaVAModel",
        "the model class",
        "other layers are not adapted",
        in_flags=False,
    ),
    Rule(
        flag("dense_layers"),
        _too_many_dense_layers,
        "fewer than the decoder's layers, none past the first pipeline chunk",
        "it to 1, or to a smaller number",
        "pipeline stages after the first exchange short sequences",
        in_flags=False,
    ),
    Rule(
        flag("budget"),
        _several_lengths,
        "uniform with pipeline stages or expert parallelism",
        "it to uniform",
        "pipeline shapes and expert exchanges need one length",
    ),
    Rule(
        flag("reference_cache"),
        lambda s: s.config.reference_cache,
        "no cache directory in this version (losses are kept in memory)",
        "the command: leave the flag out",
        "not built yet",
    ),
    Rule(
        "mixture of experts",
        lambda s: f"{n} experts" if (n := s.model.num_moe_experts) else None,
        "dense MLPs in this version",
        "the model",
        "not built yet",
    ),
    Rule(
        "position embedding",
        _position_embedding,
        "rope, learned_absolute or none in this version",
        "--position-embedding-type",
        "not built yet",
    ),
    Rule(
        "multi-latent attention",
        _field("multi_latent_attention"),
        "standard attention in this version",
        "the model",
        "not built yet",
    ),
    Rule(
        "sliding-window attention",
        _field("window_size"),
        "full causal attention",
        "the model, or train it without --regate",
        "distances would count kept tokens only",
    ),
    Rule(
        "multi-token prediction",
        _field("mtp_num_layers"),
        "no MTP layers",
        "--mtp-num-layers to none",
        "targets would become the next kept token",
    ),
    Rule(
        "linear or experimental attention",
        lambda s: _field("experimental_attention_variant")(s) or _field("linear_attention_freq")(s),
        "softmax attention in every layer",
        "the model, or train it without --regate",
        "state would skip elided tokens",
    ),
    Rule("FP4", _field("fp4"), "bf16 or FP8 in this version", "the precision flags", "lengths are not aligned for it"),
    Rule(
        "attention masks per document with a teacher",
        lambda s: "--reset-attention-mask" if s.config.needs_teacher and s.arg("reset_attention_mask") else None,
        "rows read as a whole, or a score without teacher (student, random)",
        "the command: leave --reset-attention-mask out",
        "the teacher would read across documents",
    ),
    Rule("CUDA graphs", _cuda_graphs, "none", "--cuda-graph-impl to none", "lengths change between steps"),
    Rule(
        "combined 1F1B",
        _field("overlap_moe_expert_parallel_comm"),
        "the plain schedules",
        "the command: leave --overlap-moe-expert-parallel-comm out",
        "preprocessing runs after the plan has gone",
    ),
    Rule(
        "tensor-parallel communication overlap",
        _field("tp_comm_overlap"),
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
    Rule("fully sharded data parallel", _fsdp, "Megatron's DDP", "the command: leave the flag out", "not built yet"),
    Rule(
        "fused RoPE",
        _fused_rope,
        "micro-batch size 1, or unfused RoPE",
        "the command: add --no-rope-fusion",
        "the fused kernel takes one row of positions",
        in_flags=False,
    ),
)


class _FlagsAsModel:
    """Megatron's parsed flags, read as if they were the model's config."""

    _OTHER_NAMES = {"num_moe_experts": "num_experts"}

    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, self._OTHER_NAMES.get(name, name))


def setting_of_flags(args: Any, config: ReGateConfig) -> Setting:
    """What Megatron's flags alone tell, before a model is built; for ``check_support(…, flags_only=True)``."""
    chunk = SimpleNamespace(config=_FlagsAsModel(args), position_embedding_type=args.position_embedding_type)
    return Setting([chunk], config, args)


def check_support(setting: Setting, *, flags_only: bool = False) -> tuple[bool, str]:
    """Whether ReGATE can run as asked: ``(True, "")`` or ``(False, one-line reason)``."""
    for rule in RULES:
        given = rule.given(setting) if rule.in_flags or not flags_only else None
        if given is not None:
            error = refuse(rule.what, given=given, allowed=f"{rule.allowed} ({rule.why})", change=rule.change)
            return False, str(error)
    return True, ""


def length_alignment(model: Any) -> int:
    """What kept lengths must be a multiple of: what context and sequence parallelism cut, and FP8's matrix sizes."""
    context = model.context_parallel_size
    slices = context * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    if model.fp8:
        from megatron.core.fp8_utils import get_fp8_align_size

        # The rows of a rank's matrices, b·K/(CP·TP), must divide by the size; a K that does alone serves every b.
        slices *= get_fp8_align_size(model.fp8_recipe)
    return math.lcm(slices, segment_alignment(model))


def segment_alignment(model: Any) -> int:
    """What the segments of a packed row must be multiples of: context parallelism cuts each by itself."""
    context = model.context_parallel_size
    return 2 * context if context > 1 else 1


def unwrap(module: Any) -> Any:
    """The framework's model below DDP, Float16Module and the like."""
    while hasattr(module, "module"):
        module = module.module
    return module


def language_model_of(model: Any) -> Any:
    """The GPTModel inside a multimodal model, or the model itself."""
    return getattr(model, "language_model", None) or model


def versions() -> str:
    """The versions that matter, for the log line."""
    import torch

    found = [f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
