"""What is supported, and the only place that knows Megatron's versions and symbols.

:data:`RULES` is one table of refusals; :func:`check_support` walks it before step 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from regate_megatron.config import ReGateConfig, flag
from regate_megatron.errors import refuse

MEGATRON_CORE = "0.17 to 0.20"


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


def _budget_with_pipeline(setting: Setting) -> Any:
    stages = setting.model.pipeline_model_parallel_size
    return f"per-sample with {stages} pipeline stages" if setting.config.budget == "per-sample" and stages > 1 else None


def _dataset_rows(setting: Setting) -> Any:
    names = ("sft", "dataloader_inter_document_masking", "use_packed_sequence", "hybrid_context_parallel")
    return next((f"--{name.replace('_', '-')}" for name in names if setting.arg(name)), None)


def _position_embedding(setting: Setting) -> Any:
    kind = setting.chunks[0].position_embedding_type
    return None if kind in ("rope", "learned_absolute", "none") else kind


def _sequence_parallel_multimodal(setting: Setting) -> Any:
    return "--sequence-parallel with LLaVAModel" if setting.is_multimodal and setting.model.sequence_parallel else None


def _fsdp(setting: Setting) -> Any:
    names = ("use_megatron_fsdp", "use_torch_fsdp2")
    return next((f"--{name.replace('_', '-')}" for name in names if setting.arg(name)), None)


def _teacher_with_vpp(setting: Setting) -> Any:
    vpp = setting.model.virtual_pipeline_model_parallel_size
    return f"{vpp} virtual pipeline stages" if vpp and setting.config.needs_teacher else None


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
        lambda s: "balanced" if s.config.budget == "balanced" else None,
        "uniform or per-sample in this version",
        "it to uniform",
        "not built yet",
    ),
    Rule(
        flag("budget"), _budget_with_pipeline, "uniform with pipeline stages", "it to uniform", "static pipeline shapes"
    ),
    Rule(
        flag("reference_cache"),
        lambda s: s.config.reference_cache,
        "no cache directory in this version (losses are kept in memory)",
        "the command: leave the flag out",
        "not built yet",
    ),
    Rule(
        "context parallelism",
        lambda s: n if (n := s.model.context_parallel_size) > 1 else None,
        "1 in this version",
        "--context-parallel-size to 1",
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
        "sequence parallelism in a multimodal model",
        _sequence_parallel_multimodal,
        "GPTModel with sequence parallelism, LLaVAModel without",
        "the command: leave --sequence-parallel out",
        "its padding and packed_seq_params are not adapted yet",
        in_flags=False,
    ),
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
        _dataset_rows,
        "one sample per row in this version",
        "the command: leave the flag out",
        "not built yet",
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
    Rule(
        "interleaved pipeline with a teacher",
        _teacher_with_vpp,
        "a score without teacher (student, random) in this version",
        "--num-layers-per-virtual-pipeline-stage to none",
        "the teacher is not interleaved",
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
    """What kept lengths must be a multiple of: the tensor slices of sequence parallelism, and FP8's matrix sizes."""
    multiple = model.tensor_model_parallel_size if model.sequence_parallel else 1
    if not model.fp8:
        return multiple
    from megatron.core.fp8_utils import get_fp8_align_size

    size = get_fp8_align_size(model.fp8_recipe)
    # The rows of a rank's matrices, b·K/TP, must divide by the size; a K that does alone serves every b.
    return multiple * size


def unwrap(module: Any) -> Any:
    """The framework's model below DDP, Float16Module and the like."""
    while hasattr(module, "module"):
        module = module.module
    return module


def language_model_of(model: Any) -> Any:
    """The GPTModel inside a multimodal model, or the model itself."""
    return getattr(model, "language_model", None) or model


def versions() -> str:
    """The versions that matter, for the log line. Megatron's is that of the copy in use, often no installed package."""
    import megatron.core
    import torch

    found = [f"torch {torch.__version__}", f"megatron-core {megatron.core.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        found.append(f"transformer-engine {metadata.version('transformer-engine')}")
    return ", ".join(found)
