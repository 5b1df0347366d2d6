"""Batch adapters: what a framework's batch says, as facts in positions of the merged row (text and visual).

One adapter per batch layout. An adapter reads a batch and edits one thing only: the loss mask of elided targets.
"""

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts
from regate_megatron.batches.gpt import GPTBatches
from regate_megatron.batches.llava import LLaVABatches

__all__ = ["BatchAdapter", "GPTBatches", "LLaVABatches", "MicrobatchFacts"]
