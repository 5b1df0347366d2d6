"""The language model of a Hugging Face vision-language model as a causal language model of its own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.names import EMBEDDING, rules_for
from regate_megatron.checkpoints.safetensors_folder import write_companions, write_safetensors
from regate_megatron.checkpoints.targets import check_target, new_folder
from regate_megatron.checkpoints.text_model import TextModel, open_text_model
from regate_megatron.checkpoints.to_megatron import alone_config
from regate_megatron.errors import refuse


@dataclass(frozen=True)
class TextExtraction:
    """What there is to copy.

    Attributes:
        model: the language model inside the other.
        names: a causal language model's names -> names in the source.
    """

    model: TextModel
    names: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its new name."""
        folder = self.model.folder
        return {
            name: torch.Size(folder.shape(old)).numel() * folder.dtype(old).itemsize for name, old in self.names.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes to be written."""
        return sum(self.sizes.values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor, one at a time."""
        yield from ((name, self.model.folder.read(old).contiguous()) for name, old in self.names.items())


def open_inner_model(source: str | Path) -> TextModel:
    """The language model of a LLaVA, Qwen2-VL, Qwen2.5-VL, InternVL or similar; headers only.

    Raises:
        ReGateError: see ``text_model.open_text_model``; or the source is a language model already.
    """
    model = open_text_model(source, inside=True)
    if not model.inside:
        raise refuse(
            "--source",
            given=f"{source}, which is a language model already",
            allowed="a vision-language model",
            change="the command: convert it as it is with tools/convert_hf_teacher.py",
        )
    return model


def plan_text_extraction(model: TextModel, target: str | Path, *, overwrite: bool) -> TextExtraction:
    """List what is to be copied, and check the target.

    Raises:
        ReGateError: see ``targets.check_target``.
    """
    order: dict[str, str] = {}
    rules = sorted(rules_for(model.architecture), key=lambda rule: (rule.megatron != EMBEDDING, not rule.per_layer))
    for rule in rules:
        for layer in model.layers(rule):
            names = [name.format(layer) for name in rule.sources]
            order |= dict(zip(names, model.sources(rule, layer), strict=True))
    plan = TextExtraction(model, order)
    check_target(target, sources=(model.folder.path,), overwrite=overwrite, num_bytes=plan.num_bytes)
    return plan


def extract_text(
    plan: TextExtraction,
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write the language model, a config of its own and the tokenizer; nothing is left there after an error.

    Raises:
        ReGateError: the target cannot be written.
    """
    folder = plan.model.folder
    with new_folder(target, sources=(folder.path,), overwrite=overwrite, num_bytes=plan.num_bytes) as aside:
        write_safetensors(aside, plan.sizes, plan.tensors(), progress=progress)
        config = alone_config(plan.model, folder.dtype(next(iter(plan.names.values()))))
        write_companions(aside, folder.companions(), config)
