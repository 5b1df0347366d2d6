"""The families of models whose batches are known: one row per class, by its module-qualified name.

A row says how a refusal names the family, and what makes the adapter of its batches. A class that is no row is refused,
whatever attributes it has: nothing was ever run with it. A class of one's own below a known one counts as that one as
long as it changes nothing that runs (:func:`regate_megatron.compat.known_as`).

To add a family: its class, and a factory of an adapter; a test that runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regate_megatron import compat
from regate_megatron.batches import mcore_bridge
from regate_megatron.batches.dynamic_pictures import Resolution
from regate_megatron.batches.facts import BatchAdapter
from regate_megatron.batches.gpt import GPTBatches
from regate_megatron.batches.llava import LLaVABatches
from regate_megatron.batches.mimo import MimoBatches
from regate_megatron.batches.multimodal import MultimodalBatches
from regate_megatron.batches.qwen_vl import QwenVLBatches
from regate_megatron.batches.refusals import on_one_context_rank, refused_model
from regate_megatron.batches.sample_key import BY_CONTENT, NamedSamples
from regate_megatron.batches.sized_pictures import SizedPictures
from regate_megatron.errors import ReGateError


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        title: how a refusal names it.
        adapter: makes the adapter from the framework's model, the tokenizer's pad id and the framework's namespace.
    """

    title: str
    adapter: Callable[[Any, int | None, Any], BatchAdapter]


def adapter_for(model: Any, pad_token: int | None, args: Any = None, sample_key: str = BY_CONTENT) -> BatchAdapter:
    """The adapter of the batches that scripts for this model read.

    Args:
        model: the framework's model, unwrapped: a language model, or one with a ``language_model`` inside.
        pad_token: the tokenizer's pad id, where the batch says by it which labels have no loss.
        args: the framework's namespace, for how its script packs rows.
        sample_key: what finds a sample's difficulty again, see :mod:`.sample_key`.

    Raises:
        ReGateError: no row of the table; every rank has the same model, so every rank raises.
    """
    name = compat.known_as(model, FAMILIES)
    if name is None:
        raise refused_model(
            f"{type(model).__name__} ({compat.qualified_name(type(model))})",
            ", ".join(family.title for family in FAMILIES.values()) + " (no other was ever run)",
            "the model class, or train it without --regate",
        )
    adapter = FAMILIES[name].adapter(model, pad_token, args)
    return adapter if sample_key == BY_CONTENT else NamedSamples(adapter, sample_key)


def _reads_position_ids(model: Any) -> bool:
    """Whether a token's position id changes what the language model makes of it, beyond rotary distances."""
    return compat.language_model_of(model).position_embedding_type == "learned_absolute"


def _text(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    return GPTBatches(_reads_position_ids(model))


def _llava(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    overlaps = model.sequence_parallel_lm and model.tp_comm_overlap_lm  # then it takes rows of one length alone
    if overlaps:
        on_one_context_rank(model, "LLaVAModel with tp_comm_overlap", change="or leave the overlap out")
    merged = LLaVABatches(
        image_length=model.img_seq_len,
        image_token=model.image_token_index,
        max_length=model._language_max_sequence_length,
        pads_to_max=model._language_is_pipeline_parallel or overlaps,
        multiple=_llava_multiple(model),
        packs=_llava_packs(model, args),
        reads_position_ids=_reads_position_ids(model),
        resolution=_llava_resolution(model),
    )
    return MultimodalBatches(merged, pad_token)


def _llava_resolution(model: Any) -> Resolution | None:
    """What a LLaVAModel of dynamic resolution makes of patches; None for one of another kind.

    Megatron-Core 0.18 and 0.19 have one form of it, the head (0.20) another.

    Raises:
        ReGateError: the model cannot run it so, with ReGATE or without, or nobody has.
    """
    is_head = getattr(model, "_dynamic_resolution", False)
    if not is_head and not getattr(model, "dynamic_resolution", False):
        return None
    stages, frames = model.config.pipeline_model_parallel_size, getattr(model, "temporal_patch_dim", 1)
    merged, drops = 4 if model._pixel_shuffle else 1, getattr(model, "_drop_vision_class_token", True)
    if frames > 1:
        on_one_context_rank(model, f"LLaVAModel with temporal_patch_dim {frames}")
    elif stages > 1:
        why = "one: Megatron's last stage has no tower to count positions by, and stops or puts labels elsewhere"
        raise _refused_resolution(f"on {stages} pipeline stages", why)
    if not drops:
        why = "class tokens dropped: Megatron makes embeddings of them and counts none"
        raise _refused_resolution("that keeps class tokens (drop_vision_class_token)", why)
    if is_head and (model._conv_merging or model._max_num_tiles > 1):
        raise _refused_resolution("with tiles or conv_merging", "neither (nobody has run it)")
    if frames > 1:
        return Resolution(merged, in_squares=True, frames=frames, length=model.img_seq_len)
    return Resolution(merged, in_squares=is_head, most_rows=1 if is_head else None)


def _refused_resolution(given: str, allowed: str) -> ReGateError:
    change = "that, or dynamic_resolution to False"
    return refused_model(f"LLaVAModel of dynamic resolution {given}", allowed, change)


def _llava_multiple(model: Any) -> int:
    """What a LLaVAModel pads its merged rows to."""
    context = model.context_parallel_lm
    tensor = model.tensor_model_parallel_size_lm if model.sequence_parallel_lm else 1
    return (2 * context if context > 1 else 1) * tensor


def _llava_packs(model: Any, args: Any) -> bool | str:
    """Whether the script hands a LLaVAModel the rows of a microbatch as one: Megatron-LM's do, to pad them for CP.

    pretrain_vlm.py where they need padding or is told to, examples/multimodal always; a script of one's own does not.
    """
    if args is None or model.context_parallel_lm == 1:
        return False
    if hasattr(args, "use_packed_sequence"):
        return "always" if args.use_packed_sequence else True
    return "always" if hasattr(args, "max_num_tiles") else False


_WHOLE_ROWS = "as each would get the whole row with its own part of the rotary table, ReGATE or not"


def _bridge_qwen_vl(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    on_one_context_rank(model, "Qwen25VLModel of Megatron-Bridge", _WHOLE_ROWS, "or take Qwen3-VL")
    return QwenVLBatches(
        image_token=model.config.image_token_id,
        video_token=model.config.video_token_id,
        merge_size=model.config.vision_config.spatial_merge_size,
        rope_index=model.get_rope_index,
    )


def _bridge_qwen3_vl(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope import get_rope_index

    def rope_index(tokens: Any, _kinds: Any, image_grid: Any, video_grid: Any, **_: Any) -> Any:
        ids = (model.config.spatial_merge_size, model.image_token_id, model.video_token_id, model.vision_start_token_id)
        return get_rope_index(*ids, tokens, image_grid_thw=image_grid, video_grid_thw=video_grid)

    return QwenVLBatches(
        image_token=model.image_token_id,
        video_token=model.video_token_id,
        merge_size=model.config.spatial_merge_size,
        rope_index=rope_index,
    )


def _bridge_glm(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    on_one_context_rank(model, "GLM45VModel of Megatron-Bridge", _WHOLE_ROWS, "or take GLM-4.5V of mcore-bridge")

    def rope_index(tokens: Any, kinds: Any, image_grid: Any, video_grid: Any, *, attention_mask: Any, **_: Any) -> Any:
        is_real = (tokens != 0).long() if attention_mask is None else attention_mask  # what the model takes for padding
        grids = {"image_grid_thw": image_grid, "video_grid_thw": video_grid}
        return model.get_rope_index(tokens, mm_token_type_ids=kinds, **grids, attention_mask=is_real)

    return QwenVLBatches(
        image_token=model.config.image_token_id,
        video_token=model.config.image_token_id,
        merge_size=model.config.vision_config.spatial_merge_size,
        rope_index=rope_index,
        takes_kinds=True,
    )


def _bridge_ministral(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    vision = model.config.hf_config
    cell = vision.vision_config.patch_size * vision.spatial_merge_size
    return SizedPictures(image_token=model.config.image_token_id, cell=cell)


_VISION = ("megatron.core.models.mimo.submodules.vision.VisionModalitySubmodules",)


def _mimo(model: Any, pad_token: int | None, args: Any) -> BatchAdapter:
    """Pictures of one encoder, all modules on every rank."""
    language, wrong = model.language_model, []
    if getattr(model.mimo_config, "module_to_grid_map", None):
        wrong.append("modules with grids of ranks of their own (module_to_grid_map)")
    elif language.position_embedding_type not in ("rope", "yarn", "none"):
        wrong.append(f"{language.position_embedding_type} positions")
    if (stages := model.config.pipeline_model_parallel_size) > 1:
        wrong.append(f"{stages} pipeline stages")
    for name, modality in model.modality_submodules.items():
        encoders = getattr(modality, "encoders", ())  # in a wrapper of its own it has none
        if not compat.is_one_of(modality, _VISION) or len(encoders) != 1:
            wrong.append(f"modality {name} of {type(modality).__name__} with {len(encoders)} encoders")
    if wrong:
        allowed = "rope, yarn or none, and pictures of one encoder, on every rank alike (nothing else was ever run)"
        raise refused_model(f"MimoModel: {', '.join(wrong)}", allowed, "the model, or train it without --regate")
    names = tuple(model.modality_submodules)
    return MimoBatches(names, tuple(model.special_token_ids[name] for name in names))


FAMILIES = {
    "megatron.core.models.gpt.gpt_model.GPTModel": Family("GPTModel", _text),
    # MambaModel is a HybridModel from core 0.18 on; the class of that name before it is another.
    "megatron.core.models.hybrid.hybrid_model.HybridModel": Family("HybridModel", _text),
    "megatron.core.models.multimodal.llava_model.LLaVAModel": Family("LLaVAModel", _llava),
    "megatron.bridge.models.qwen_vl.modeling_qwen25_vl.Qwen25VLModel": Family(
        "Qwen25VLModel of Megatron-Bridge", _bridge_qwen_vl
    ),
    "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model.Qwen3VLModel": Family(
        "Qwen3VLModel of Megatron-Bridge", _bridge_qwen3_vl
    ),
    "megatron.bridge.models.glm_vl.modeling_glm_45v.GLM45VModel": Family("GLM45VModel of Megatron-Bridge", _bridge_glm),
    "megatron.bridge.models.ministral3.modeling_ministral3.Ministral3Model": Family(
        "Ministral3Model of Megatron-Bridge", _bridge_ministral
    ),
    "megatron.core.models.mimo.model.base.MimoModel": Family("MimoModel", _mimo),
    "mcore_bridge.model.mm_gpt_model.MultimodalGPTModel": Family(
        f"MultimodalGPTModel of mcore-bridge ({', '.join(mcore_bridge.KINDS)})", mcore_bridge.adapter_of
    ),
}
