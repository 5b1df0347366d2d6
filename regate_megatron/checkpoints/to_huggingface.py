"""The language model of a Megatron torch_dist checkpoint as a Hugging Face causal language model, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.arguments import from_arguments, padded_vocabulary
from regate_megatron.checkpoints.families import Architecture
from regate_megatron.checkpoints.hf_config import from_config, text_config, to_config
from regate_megatron.checkpoints.names import OUTPUT, Rule, merged_shape, rules_for, split
from regate_megatron.checkpoints.safetensors_folder import (
    CONFIG,
    companions_of,
    read_config,
    write_companions,
    write_safetensors,
)
from regate_megatron.checkpoints.torch_dist import TorchDistReader
from regate_megatron.errors import refuse
from regate_megatron.teacher.weights import EMBEDDING, LanguageModelCheckpoint, language_model_in


@dataclass(frozen=True)
class Output:
    """Hugging Face tensors that come out of one read.

    Attributes:
        shapes: of the tensors, by name.
        dtype: of their elements.
        read: gives them, contiguous, in the order of ``shapes``.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class ToHuggingFace:
    """A planned export.

    Attributes:
        reader: the checkpoint.
        language_model: the language model in it.
        architecture: what it is.
        outputs: what is written, in the order of writing.
        config: the ``config.json`` to be written.
        companions: tokenizer files to be copied.
    """

    reader: TorchDistReader
    language_model: LanguageModelCheckpoint
    architecture: Architecture
    outputs: list[Output]
    config: dict[str, Any]
    companions: list[Path]

    @property
    def source(self) -> Path:
        """The folder of the checkpoint's iteration."""
        return self.reader.path

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by its Hugging Face name, in the order of writing."""
        return {
            name: torch.Size(shape).numel() * output.dtype.itemsize
            for output in self.outputs
            for name, shape in output.shapes.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes to be written."""
        return sum(self.sizes.values())

    def fill(self, folder: Path, progress: Callable[[int], Any]) -> None:
        """Write the model, its config and its tokenizer; see :class:`writing.Plan`."""
        tensors = (pair for output in self.outputs for pair in zip(output.shapes, output.read(), strict=True))
        write_safetensors(folder, self.sizes, tensors, progress=progress)
        write_companions(folder, self.companions, self.config)


def outputs_of(
    reader: TorchDistReader, rules: list[Rule], architecture: Any, key_of: Callable[[str], str]
) -> list[Output]:
    """What a table's rules give, layer by layer.

    Args:
        rules: of the model that ``architecture`` describes.
        key_of: the checkpoint's name of a rule's tensor.
    """
    outputs = []
    for per_layer, group in groupby(rules, key=lambda rule: rule.per_layer):
        rows = list(group)
        for layer in range(architecture.num_layers) if per_layer else (None,):
            for rule in rows:
                key = key_of(rule.megatron)
                names = (name.format(layer) for name in rule.sources)
                outputs.append(
                    Output(
                        dict(zip(names, rule.shapes(architecture), strict=True)),
                        reader.dtype(key),
                        lambda rule=rule, key=key, layer=layer: split(rule, reader.read(key, layer), architecture),
                    )
                )
    return outputs


def plan_to_huggingface(
    source: str | Path, *, like: str | Path | None = None, family: str | None = None, vocab_size: int | None = None
) -> ToHuggingFace:
    """Plan the export; reads the index and the arguments only.

    Args:
        source: a torch_dist checkpoint of a GPTModel, or of a LLaVAModel, of which the language model is taken.
        like: a Hugging Face folder whose config and tokenizer are right; None: those beside the checkpoint, else a
            config made from the arguments in it.
        family: the family to name in a config made from the arguments.
        vocab_size: rows of the embedding to keep; None: as the config says.

    Raises:
        ReGateError: no such checkpoint, or it does not fit the config.
    """
    reader = TorchDistReader(source)
    language_model = language_model_in(reader.path, reader.shapes, "--source")
    template = template_of(source, like, family)
    saved = reader.arguments()
    prefix = language_model.prefix
    dtype = str(reader.dtype(prefix + EMBEDDING)).removeprefix("torch.")
    if template is None:
        architecture = from_arguments(saved, family)
        if vocab_size:
            architecture = dataclasses.replace(architecture, vocab_size=vocab_size)
        config = to_config(architecture, dtype)
    else:
        config = dict(text_config(read_config(template, "--like"), has_head=OUTPUT in language_model.shapes))
        if vocab_size:
            config["vocab_size"] = vocab_size
        for name in ("torch_dtype", "dtype"):
            if name in config:
                config[name] = dtype
        architecture = from_config(config)
        if config.get("model_type") != architecture.family.name:  # a text model inside another
            config = to_config(architecture, dtype)
        config["architectures"] = [architecture.family.architecture]
        _check_arguments(architecture, saved, template)
    companions = companions_of(template) if template else []
    plan = ToHuggingFace(reader, language_model, architecture, [], config, companions)
    _check_vocabulary(plan, saved, vocab_size)
    _check_tensors(plan)
    outputs = outputs_of(
        reader, rules_for(architecture), architecture, lambda name: prefix + language_model.key_of(name)
    )
    return dataclasses.replace(plan, outputs=outputs)


def template_of(source: str | Path, like: str | Path | None, family: str | None) -> Path | None:
    """The folder whose config and tokenizer are taken: the one named, else the checkpoint's own if it has a config."""
    if like is not None:
        return Path(like)
    return Path(source) if (Path(source) / CONFIG).is_file() and family is None else None


def _check_arguments(architecture: Architecture, saved: Any, template: Path) -> None:
    """Constants that no shape shows must agree with what the checkpoint was trained with, where it says so."""
    if getattr(saved, "num_layers", None) is None or getattr(saved, "padded_vocab_size", None) is None:
        return
    trained = from_arguments(saved, architecture.family.name, "--like")
    for field in dataclasses.fields(Architecture):
        if field.name in ("family", "vocab_size", "max_positions"):
            continue
        want, found = getattr(trained, field.name), getattr(architecture, field.name)
        if want != found:
            raise refuse(
                "--like",
                given=f"{template} with {field.name} {found}",
                allowed=f"{field.name} {want}, with which the checkpoint was trained",
                change="it",
            )


def _check_vocabulary(plan: ToHuggingFace, saved: Any, vocab_size: int | None) -> None:
    """The rows that are cut off must be Megatron's padding and nothing else."""
    rows, kept = plan.language_model.vocab_size, plan.architecture.vocab_size
    tokens = getattr(saved, "vocab_size", None) or 0
    divisor = getattr(saved, "make_vocab_size_divisible_by", None)
    padding = divisor and rows == padded_vocabulary(kept, divisor, getattr(saved, "tensor_model_parallel_size", 1))
    fits = kept == rows or (kept < rows and (vocab_size or (padding and tokens <= kept)))
    if not fits:
        raise refuse(
            "--source",
            given=f"{plan.reader.path} with a vocabulary of {rows} for a config with {kept}",
            allowed="the config's vocabulary, or that with Megatron's padding",
            change="--like to the model with its tokenizer, or add --vocab-size with the number of rows to keep",
        )


def _check_tensors(plan: ToHuggingFace) -> None:
    """Every tensor of the table is there with its shape, and none of the language model's is left over."""
    path, shapes = plan.reader.path, plan.language_model.shapes
    left = {name for name in shapes if not name.endswith("_extra_state")}
    for rule in rules_for(plan.architecture):
        want = merged_shape(rule, plan.architecture, plan.language_model.vocab_size)
        if rule.per_layer:
            want = (plan.architecture.num_layers, *want)
        name = plan.language_model.key_of(rule.megatron)
        if shapes.get(name) != want:
            raise refuse(
                "--source",
                given=f"{path} with {rule.megatron} of shape {shapes.get(name, 'none')}",
                allowed=f"shape {want}, as the config says" + ("; layers stacked" if rule.per_layer else ""),
                change="the config (--like), or the checkpoint",
            )
        left.discard(name)
    if left:
        change = "--like to a model with untied embeddings" if left == {OUTPUT} else "the model"
        given = f"{path} with {sorted(left)[0]}"
        allowed = f"only tensors of a dense {plan.architecture.family.name} of its config"
        raise refuse("--source", given=given, allowed=allowed, change=change)
