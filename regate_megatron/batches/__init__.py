"""Batch adapters: what a framework's batch says, as facts in positions of the merged row (text and visual).

One adapter per batch layout. An adapter reads a batch and edits one thing only: the loss mask of elided targets.
"""

from typing import Any

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts
from regate_megatron.batches.gpt import GPTBatches
from regate_megatron.batches.llava import LLaVABatches
from regate_megatron.batches.media import Media
from regate_megatron.batches.multimodal import MultimodalBatches
from regate_megatron.batches.qwen_vl import QwenVLBatches
from regate_megatron.errors import refuse

__all__ = [
    "BatchAdapter",
    "GPTBatches",
    "LLaVABatches",
    "Media",
    "MicrobatchFacts",
    "MultimodalBatches",
    "QwenVLBatches",
    "adapter_for",
]


def adapter_for(model: Any, pad_token: int | None, args: Any = None) -> BatchAdapter:
    """The adapter of the batches that scripts for this model read.

    Args:
        model: the framework's model, unwrapped: a language model, or one with a ``language_model`` inside.
        pad_token: the tokenizer's pad id, where the batch says by it which labels have no loss.
        args: the framework's namespace, for how its script packs rows.
    """
    if getattr(model, "language_model", None) is None:
        return GPTBatches()
    if hasattr(model, "image_token_index"):  # LLaVAModel
        merged = LLaVABatches(
            image_length=model.img_seq_len,
            image_token=model.image_token_index,
            max_length=model._language_max_sequence_length,
            pads_to_max=model._language_is_pipeline_parallel,
            multiple=_llava_multiple(model),
            packs=_llava_packs(model, args),
        )
        return MultimodalBatches(merged, pad_token)
    if not hasattr(model, "get_rope_index"):
        error = refuse(
            "model",
            given=type(model).__name__,
            allowed="GPTModel, HybridModel, LLaVAModel, or Megatron-Bridge's Qwen2.5-VL",
            change="the model class, or train it without --regate",
        )
        error.everywhere = True
        raise error
    return QwenVLBatches(
        image_token=model.config.image_token_id,
        video_token=model.config.video_token_id,
        merge_size=model.config.vision_config.spatial_merge_size,
        rope_index=model.get_rope_index,
    )


def _llava_multiple(model: Any) -> int:
    """What a LLaVAModel pads its merged rows to."""
    context = model.context_parallel_lm
    tensor = model.tensor_model_parallel_size_lm if model.sequence_parallel_lm else 1
    return (2 * context if context > 1 else 1) * tensor


def _llava_packs(model: Any, args: Any) -> bool | str:
    """Whether the script hands a LLaVAModel the rows of a microbatch as one: Megatron-LM's do, to pad them for CP."""
    if args is None or model.context_parallel_lm == 1:
        return False
    return "always" if getattr(args, "use_packed_sequence", False) else True
