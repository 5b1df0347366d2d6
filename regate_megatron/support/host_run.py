"""What a host tells of its run, in no framework's own words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HostRun:
    """One run of a host, as it stands when a model is attached or a checkpoint is saved. Made by the host's module.

    Attributes:
        iteration: iterations done.
        micro_batch_size: rows per microbatch.
        load, save: the folder of the checkpoint that was loaded, and the one checkpoints go to; iterations lie in it.
        async_save: whether the host writes checkpoints while it trains on.
        keeps_non_persistent: whether it also makes checkpoints that replace one another, on storage all ranks see.
        non_persistent_folder: where those go; None: beside the others.
        tokenizer: the student's; None where the host has none.
        tokenizer_model: its file, folder or name.
        pad_token: its pad id, where the tokenizer does not tell it itself.
        has_adapters: whether parts of the student are adapters (LoRA and the like).
        switches_adapters: whether any pipeline stage has adapters that can be switched off; found out by ``attach``.
        fsdp, document_masks: the host's setting that asks for fully sharded data parallelism, or for attention masks
            per document, as the user wrote it; None where none does.
        flags: Megatron-LM's namespace, for rules about Megatron-LM's own flags; None in any other host.
    """

    iteration: int = 0
    micro_batch_size: int = 1
    load: Path | None = None
    save: Path | None = None
    async_save: bool = False
    keeps_non_persistent: bool = False
    non_persistent_folder: Path | None = None
    tokenizer: Any = None
    tokenizer_model: str | None = None
    pad_token: int | None = None
    has_adapters: bool = False
    switches_adapters: bool = False
    fsdp: str | None = None
    document_masks: str | None = None
    flags: Any = None


def folder_or_none(path: str | Path | None) -> Path | None:
    """A path that a host may have left empty."""
    return Path(path) if path else None
