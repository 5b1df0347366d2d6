"""A Hugging Face language model as a Megatron torch_dist checkpoint, streamed tensor by tensor."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.arguments import divisor_for, model_flags, padded_vocabulary, to_arguments
from regate_megatron.checkpoints.hf_config import to_config
from regate_megatron.checkpoints.names import Rule, merge, merged_shape, rules_for
from regate_megatron.checkpoints.safetensors_folder import write_companions
from regate_megatron.checkpoints.text_model import TextModel
from regate_megatron.checkpoints.torch_dist import Piece, extra_states, write_torch_dist
from regate_megatron.errors import refuse

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ToMegatron:
    """A planned conversion.

    Attributes:
        model: the language model.
        pieces: the parts of the tensors to be written.
        arguments: Megatron's arguments to be stored.
        flags: the flags that match the language model.
        config: the ``config.json`` to be written beside them.
        companions: files of the tokenizer to be copied.
    """

    model: TextModel
    pieces: list[Piece]
    arguments: Namespace
    flags: list[str]
    config: dict[str, Any]
    companions: list[Path]

    @property
    def source(self) -> Path:
        """The Hugging Face folder."""
        return self.model.folder.path

    @property
    def num_bytes(self) -> int:
        """Bytes to be written."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def num_parameters(self) -> int:
        """Elements to be written, vocabulary padding included."""
        return sum(torch.Size(piece.shape).numel() for piece in self.pieces)

    @property
    def padding(self) -> int:
        """Rows of zeros added to the vocabulary."""
        return self.arguments.padded_vocab_size - self.model.architecture.vocab_size

    def fill(self, folder: Path, progress: Callable[[int], Any]) -> None:
        """Write the checkpoint, its config and its tokenizer; see :class:`writing.Plan`."""
        common = {"args": self.arguments, "checkpoint_version": 3.0, "iteration": 0}
        write_torch_dist(folder, self.pieces, objects=extra_states(self.pieces), common=common, progress=progress)
        write_companions(folder, self.companions, self.config)


def plan_to_megatron(
    model: TextModel, *, tensor_size: int = 1, divisor: int = 128, dtype: torch.dtype | None = None
) -> ToMegatron:
    """Plan the conversion; reads headers only.

    Args:
        tensor_size: tensor-parallel size of the runs that will load it, for the padding of the vocabulary alone.
        divisor: ``--make-vocab-size-divisible-by`` of these runs.
        dtype: type to convert to; None: as it is.

    Raises:
        ReGateError: tensors that Megatron stacks are of different types.
    """
    architecture = model.architecture
    padded = padded_vocabulary(architecture.vocab_size, divisor, tensor_size)
    divisor = divisor_for(_num_tokens(model), padded, tensor_size, divisor)
    pieces = [piece for rule in rules_for(architecture) for piece in pieces_of(model, rule, padded, dtype)]
    arguments = to_arguments(architecture, padded_vocab=padded, divisor=divisor, tensor_size=tensor_size)
    stored = {piece.dtype for piece in pieces}
    arguments.bf16, arguments.fp16 = stored == {torch.bfloat16}, stored == {torch.float16}
    flags, config = model_flags(architecture, divisor), alone_config(model, pieces[0].dtype)
    return ToMegatron(model, pieces, arguments, flags, config, model.folder.companions())


def alone_config(model: TextModel, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration of the language model by itself: its own where it has one."""
    if not model.inside:
        return model.config
    ids = {name: model.config[name] for name in _TOKEN_IDS if model.config.get(name) is not None}
    return to_config(model.architecture, str(dtype).removeprefix("torch.")) | ids


def pieces_of(model: Any, rule: Rule, padded: int, dtype: torch.dtype | None) -> list[Piece]:
    """The parts of one tensor of Megatron, a layer each.

    Args:
        model: gives ``folder``, ``architecture``, and the names of a rule's ``sources`` in its ``layers``.
        padded: rows of the word embedding.
        dtype: type to convert to; None: as it is.

    Raises:
        ReGateError: layers are of different types.
    """
    sources = {layer: model.sources(rule, layer) for layer in model.layers(rule)}
    found = {model.folder.dtype(name) for names in sources.values() for name in names}
    if dtype is None and len(found) > 1:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in found))
        raise refuse(
            "--source",
            given=f"{model.folder.path}, whose {rule.sources[0]} are {kinds}",
            allowed="one type for all layers, which Megatron stacks",
            change="the command: add --dtype",
        )
    kind = dtype or found.pop()
    shape = merged_shape(rule, model.architecture, padded)

    def reader(names: list[str]) -> Callable[[], torch.Tensor]:
        return lambda: merge(rule, [model.folder.read(name).to(kind) for name in names], model.architecture, padded)

    if not rule.per_layer:
        return [Piece(rule.megatron, shape, (0,) * len(shape), shape, kind, reader(sources[None]))]
    return [
        Piece(
            name=rule.megatron,
            size=(model.architecture.num_layers, *shape),
            offsets=(layer, *(0 for _ in shape)),
            shape=(1, *shape),
            dtype=kind,
            read=reader(names),
        )
        for layer, names in sources.items()
    ]


def _num_tokens(model: TextModel) -> int:
    """Tokens of the tokenizer beside the model; the rows of the embedding where it cannot be counted."""
    file = model.folder.path / "tokenizer.json"
    rows = model.architecture.vocab_size
    if not file.is_file():
        return rows
    try:
        content = json.loads(file.read_text())
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens", [])
        pairs = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        count = len(set(pairs) | {token["id"] for token in added})
    except (OSError, ValueError, KeyError, TypeError):
        return rows
    return count if count <= rows else rows
