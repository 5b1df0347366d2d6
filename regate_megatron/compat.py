"""What is supported, and the only place that knows Megatron's versions and symbols.

:data:`RULES` is one table of refusals; :func:`check_support` walks it before step 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from regate_megatron.config import STUDENT_AS_TEACHER, ReGateConfig, flag
from regate_megatron.errors import refuse

# Layers of a HybridModel whose tokens meet in softmax attention over the whole sequence, or not at all.
_EXACT_LAYERS = "*+-E"
_OTHER_LAYERS = {"M": "Mamba", "G": "gated delta net", "D": "sparse attention"}
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


def _first_field(*names: str) -> Callable[[Setting], Any]:
    return lambda setting: next((found for name in names if (found := _field(name)(setting))), None)


def _layers_of_first_chunk(setting: Setting) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    stages = setting.model.pipeline_model_parallel_size
    if pattern := _pattern(setting):
        segments = pattern.split("/")[0].split("|")  # stages parted by "|"; what follows "/" predicts ahead
        if len(segments) > 1:
            return len(segments[0])
        return setting.model.num_layers_in_first_pipeline_stage or setting.model.num_layers // stages
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


def _dense_last_layers(setting: Setting) -> Any:
    last, stages = setting.config.dense_last_layers, setting.model.pipeline_model_parallel_size
    if last and stages > 1:
        return f"{last} with {stages} pipeline stages"
    first, layers = setting.config.dense_layers, setting.model.num_layers
    if last and layers and first + last >= layers:  # flags with a layer pattern have no number of layers
        return f"{last} with {flag('dense_layers')} {first} of {layers} decoder layers"
    return None


def _pattern(setting: Setting) -> str | None:
    """The layer pattern of a HybridModel; None for a GPTModel."""
    return getattr(setting.chunks[0], "hybrid_layer_pattern", None)


def _model_class(setting: Setting) -> Any:
    names = [type(chunk).__name__ for chunk in setting.chunks]
    return None if all(_is_known(chunk) for chunk in setting.chunks) else ", ".join(names)


def _is_known(chunk: Any) -> bool:
    from megatron.core.models.gpt import GPTModel

    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:  # before 0.18
        return isinstance(chunk, GPTModel)
    return isinstance(chunk, (GPTModel, HybridModel))


def _inexact_layers(setting: Setting) -> Any:
    kinds = sorted(set((_pattern(setting) or "").split("/")[0]) - set(_EXACT_LAYERS + "|"))
    return ", ".join(_OTHER_LAYERS.get(kind, kind) for kind in kinds) or None


def _more_than_one_token(setting: Setting) -> Any:
    depths = (_pattern(setting) or "").count("/")
    return _field("mtp_num_layers")(setting) or (f"{depths} in the layer pattern" if depths else None)


def _routing(setting: Setting) -> Any:
    kinds = setting.model.moe_router_load_balancing_type
    kinds = kinds if isinstance(kinds, list) else [kinds]
    wrong = [kind for kind in kinds if kind in ("sinkhorn", "quantile_balancing")]
    return ", ".join(wrong) or _first_field("moe_router_force_load_balancing", "moe_enable_routing_replay")(setting)


def _dispatcher(setting: Setting) -> Any:
    if setting.model.num_moe_experts and setting.model.moe_token_dispatcher_type == "flex":
        return "moe_token_dispatcher_type=flex"
    return _first_field("moe_enable_deepep", "moe_paged_stash")(setting)


def _fused_latent_rope(setting: Setting) -> Any:
    return "fused RoPE" if setting.model.multi_latent_attention and setting.model.apply_rope_fusion else None


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
    stages, experts = setting.model.pipeline_model_parallel_size, experts_span_replicas(setting.model)
    if setting.config.budget == "uniform" or not (stages > 1 or experts):
        return None
    ranks = getattr(setting.model, "expert_model_parallel_size", 1)
    experts = f"{ranks} ranks that share experts" if ranks > 1 else "experts cut over several replicas"
    where = f"{stages} pipeline stages" if stages > 1 else experts
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
    if kind == "mrope" and setting.model.context_parallel_size > 1:
        return "mrope with context parallelism"
    return None if kind in ("rope", "yarn", "mrope", "learned_absolute", "none") else kind


def _fsdp(setting: Setting) -> Any:
    names = ("use_megatron_fsdp", "use_torch_fsdp2")
    return next((f"--{name.replace('_', '-')}" for name in names if setting.arg(name)), None)


def _adapters_in_teacher(setting: Setting) -> Any:
    takes_student = setting.config.needs_teacher and setting.config.teacher_load == STUDENT_AS_TEACHER
    return "student, which has adapters" if takes_student and setting.arg("peft") else None


RULES = (
    Rule(
        "model",
        _model_class,
        "GPTModel or HybridModel, alone or in a LLaVAModel",
        "the model class",
        "other layers are not adapted",
        in_flags=False,
    ),
    Rule(
        "layers of a hybrid model",
        _inexact_layers,
        "attention, multi-latent attention, MLP and expert layers",
        "the layer pattern, or train it without --regate",
        "state or convolution would skip elided tokens",
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
        flag("dense_last_layers"),
        _dense_last_layers,
        "fewer than the layers after the first dense ones, without pipeline stages",
        "it to 0, or --pipeline-model-parallel-size to 1",
        "elided positions come back where the whole decoder is",
    ),
    Rule(
        flag("budget"),
        _several_lengths,
        "uniform with pipeline stages or expert parallelism",
        "it to uniform",
        "pipeline shapes and expert exchanges need one length",
    ),
    Rule(
        "expert routing",
        _routing,
        "top-k routing, with auxiliary losses or expert bias",
        "--moe-router-load-balancing-type",
        "a token's expert would depend on elided tokens",
    ),
    Rule(
        "expert capacity",
        _first_field(
            *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_expert_rank_capacity_factor"),
        ),
        "experts that drop no token",
        "the command: leave the capacity out",
        "which tokens are dropped would depend on the length",
    ),
    Rule(
        "expert dispatcher",
        _dispatcher,
        "allgather or alltoall, without fixed buffers",
        "--moe-token-dispatcher-type",
        "buffers are sized at first use",
    ),
    Rule(
        "position embedding",
        _position_embedding,
        "rope, yarn, learned_absolute or none; mrope without context parallelism",
        "--position-embedding-type",
        "relative distances would count kept tokens only",
    ),
    Rule(
        "multi-latent attention",
        _fused_latent_rope,
        "unfused RoPE",
        "the command: add --no-rope-fusion",
        "the fused kernel makes its own positions",
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
        _more_than_one_token,
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
    Rule(
        "activation offloading",
        _first_field("cpu_offloading", "fine_grained_activation_offloading"),
        "activations that stay on the device, recomputed or not",
        "the command: leave it out",
        "needs a GPU to be tried",
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


class _FlagsAsModel:
    """Megatron's parsed flags, read as if they were the model's config."""

    _OTHER_NAMES = {"num_moe_experts": "num_experts"}

    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, self._OTHER_NAMES.get(name, name))


def setting_of_flags(args: Any, config: ReGateConfig) -> Setting:
    """What Megatron's flags alone tell, before a model is built; for ``check_support(…, flags_only=True)``."""
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    chunk = SimpleNamespace(
        config=_FlagsAsModel(args),
        position_embedding_type=args.position_embedding_type,
        hybrid_layer_pattern=pattern,
    )
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


def experts_span_replicas(model: Any) -> bool:
    """Whether experts lie on ranks of several data-parallel replicas, which then run their layers together."""
    tensor = model.tensor_model_parallel_size
    expert_tensor = getattr(model, "expert_tensor_parallel_size", None) or tensor
    return getattr(model, "expert_model_parallel_size", 1) > 1 or expert_tensor > tensor


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
    """The versions that matter, for the log line. Megatron's is that of the copy in use, often no installed package."""
    import megatron.core
    import torch

    found = [f"torch {torch.__version__}", f"megatron-core {megatron.core.__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        found.append(f"transformer-engine {metadata.version('transformer-engine')}")
    return ", ".join(found)
