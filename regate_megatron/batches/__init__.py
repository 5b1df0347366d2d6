"""Batch adapters: what a framework's batch says, as facts in positions of the merged row (text and visual).

One adapter per batch layout. An adapter reads a batch and edits one thing only: the loss mask of elided targets. Which
model has which adapter is a table, :mod:`.families`.
"""

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts
from regate_megatron.batches.families import FAMILIES, Family, adapter_for
from regate_megatron.batches.gpt import GPTBatches
from regate_megatron.batches.llava import LLaVABatches
from regate_megatron.batches.media import Media
from regate_megatron.batches.mimo import MimoBatches
from regate_megatron.batches.multimodal import MultimodalBatches
from regate_megatron.batches.padded_rows import PaddedRows
from regate_megatron.batches.qwen_vl import QwenVLBatches
from regate_megatron.batches.sample_key import NamedSamples
from regate_megatron.batches.sized_pictures import SizedPictures
from regate_megatron.batches.step_facts import StepFacts
from regate_megatron.batches.swift import SwiftBatches

__all__ = [
    "FAMILIES",
    "BatchAdapter",
    "Family",
    "GPTBatches",
    "LLaVABatches",
    "Media",
    "MicrobatchFacts",
    "MimoBatches",
    "MultimodalBatches",
    "NamedSamples",
    "PaddedRows",
    "QwenVLBatches",
    "SizedPictures",
    "StepFacts",
    "SwiftBatches",
    "adapter_for",
]
