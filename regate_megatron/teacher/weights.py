"""Language-model weights in Megatron torch_dist checkpoints: find them, check them, load and save them.

Nothing here unpickles freely: tensors are read by ``torch.distributed.checkpoint``, whose index file is a pickle; it is
read first by an unpickler that knows torch's metadata classes and refuses everything else.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from regate_megatron.errors import refuse
from regate_megatron.ranks.publishing import filled_by_all_ranks
from regate_megatron.ranks.topology import Topology, whole_world
from regate_megatron.teacher.settings import write_own
from regate_megatron.teacher.stated import stated_settings

EMBEDDING = "embedding.word_embeddings.weight"
LANGUAGE_MODEL_PREFIX = "language_model."
TRACKER = "latest_checkpointed_iteration.txt"
_INDEX = ".metadata"
# A norm apart, as Megatron's local layers store it, and under the linear layer behind it, as Transformer Engine's do.
_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_INDEX_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "dtype"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}


@dataclass(frozen=True)
class LanguageModelCheckpoint:
    """A language model inside a torch_dist checkpoint.

    Attributes:
        path: the folder of the iteration.
        prefix: what its keys start with: "" for a GPT, "language_model." for a LLaVA.
        shapes: global shape of every tensor of the language model, by key without prefix.
        stated: what it says of the model's settings, see :func:`.stated.stated_settings`; None: nothing.
    """

    path: Path
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    stated: dict[str, Any] | None = None

    def key_of(self, key: str) -> str:
        """The name of a tensor in this checkpoint: norms are stored apart, or under the linear layer they precede.

        Transformer Engine fuses the two, Megatron's local GPT spec stores its names, and its local LLaVA spec does not.
        """
        if key in self.shapes:
            return key
        for apart, fused in _NORMS:
            for ours, theirs in ((apart, fused), (fused, apart)):
                if ours in key and (other := key.replace(ours, theirs)) in self.shapes:
                    return other
        return key

    @property
    def vocab_size(self) -> int:
        """Rows of the word embedding: the vocabulary with Megatron's padding."""
        return self.shapes[EMBEDDING][0]


def canonical_name(key: str) -> str:
    """One name for a tensor however its norm is stored; see :meth:`LanguageModelCheckpoint.key_of`."""
    for apart, fused in _NORMS:
        key = key.replace(apart, fused)
    return key


def local_name(key: str) -> str:
    """The name of a tensor with its norm apart, as Megatron's local layers have it: undoes :func:`canonical_name`."""
    for apart, fused in _NORMS:
        key = key.replace(fused, apart)
    return key


def find_iteration(directory: str | Path, what: str = "checkpoint") -> Path:
    """The folder of a torch_dist checkpoint: ``directory`` itself, or the iteration its tracker file names.

    Raises:
        ReGateError: no such folder, no checkpoint in it, another format, or an index that is not plain metadata.
    """
    root = Path(directory)
    allowed = "a folder with a Megatron torch_dist checkpoint (--ckpt-format torch_dist)"
    if not root.is_dir():
        raise refuse(what, given=f"{root}, which is no folder", allowed=allowed, change="the path")
    path = root
    if not (root / "metadata.json").is_file():
        tracker = root / TRACKER
        if not tracker.is_file():
            raise refuse(
                what, given=f"{root}, which holds no checkpoint", allowed=allowed, change="the path, or convert it"
            )
        label = tracker.read_text(errors="replace").strip()
        path = root / (label if label == "release" else f"iter_{int(label):07d}" if label.isdigit() else label)
    if any(path.glob("mp_rank_*")):
        given = f"{path}, which is in the legacy format (--ckpt-format torch)"
        raise refuse(
            what,
            given=given,
            allowed=allowed,
            change='it: Megatron converts it, see "Another layout or format" in docs/tools.md',
        )
    if not (path / "metadata.json").is_file() or not (path / _INDEX).is_file():
        raise refuse(
            what,
            given=f"{path}, which is incomplete or in another format",
            allowed=allowed,
            change="the path, or save it again with --ckpt-format torch_dist",
        )
    _check_index(path / _INDEX, what)
    return path


def open_language_model(directory: str | Path, what: str = "checkpoint") -> LanguageModelCheckpoint:
    """Find the language model in a checkpoint; reads names, shapes and settings only. Any rank, no communication.

    Raises:
        ReGateError: see :func:`find_iteration`; or there is no language model in the checkpoint.
    """
    from megatron.core import dist_checkpointing

    path = find_iteration(directory, what)
    try:
        metadata = dist_checkpointing.load_tensors_metadata(str(path))
    except (Exception, CheckpointException) as error:  # whatever a damaged file makes the reader raise
        raise refuse(
            what, given=f"{path}, unreadable ({type(error).__name__})", allowed="a complete checkpoint", change="it"
        ) from error
    found = language_model_in(path, {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}, what)
    return dataclasses.replace(found, stated=stated_settings(path, saved_arguments(path)))


def language_model_in(path: Path, shapes: dict[str, tuple[int, ...]], what: str) -> LanguageModelCheckpoint:
    """Find the language model among the tensors of the checkpoint at ``path``; ``what`` is named in a refusal.

    Raises:
        ReGateError: there is none.
    """
    for prefix in ("", LANGUAGE_MODEL_PREFIX):
        if prefix + EMBEDDING in shapes:
            own = {
                key[len(prefix) :]: shape
                for key, shape in shapes.items()
                if key.startswith(prefix)
                and key[len(prefix) :].split(".")[0] in ("embedding", "decoder", "output_layer")
            }
            return LanguageModelCheckpoint(path, prefix, own)
    raise refuse(
        what,
        given=f"{path}, which holds no {EMBEDDING}",
        allowed="a checkpoint of a GPTModel or a LLaVAModel",
        change="the path",
    )


def saved_arguments(path: Path) -> Any:
    """Megatron's arguments in a checkpoint, read weights-only; None where there are none to be read."""
    from megatron.core import dist_checkpointing

    try:
        return dist_checkpointing.load_common_state_dict(str(path)).get("args")
    except (Exception, CheckpointException):  # absent, or of a class that is not allowed: the caller does without
        return None


def load_language_model(model: Any, checkpoint: LanguageModelCheckpoint) -> None:
    """Load the weights of ``checkpoint`` into a sharded language model, in place; all ranks call this.

    Raises:
        ReGateError: a data file is damaged or missing, on the ranks that read it.
    """
    from megatron.core import dist_checkpointing

    template = model.sharded_state_dict(prefix=checkpoint.prefix)
    template = {key: value for key, value in template.items() if "_extra_state" not in key}
    for value in template.values():
        if hasattr(value, "key"):
            own = value.key.removeprefix(checkpoint.prefix)
            value.key = checkpoint.prefix + checkpoint.key_of(own)
    try:
        loaded = dist_checkpointing.load(template, str(checkpoint.path))
    except (Exception, CheckpointException) as error:  # torch's own is no Exception; damaged files raise anything
        raise refuse(
            "checkpoint",
            given=f"{checkpoint.path}, whose data cannot be read ({type(error).__name__})",
            allowed="a complete checkpoint",
            change="to one saved or copied in full",
        ) from error
    weights = {key[len(checkpoint.prefix) :]: value for key, value in loaded.items() if torch.is_tensor(value)}
    missing = set(dict(model.named_parameters())) - set(weights)
    assert not missing, f"loaded no value for {sorted(missing)}"
    model.load_state_dict(weights, strict=False)  # not strict: no _extra_state is loaded into a bf16 teacher


def save_language_model(chunks: Sequence[Any], directory: str | Path, topology: Topology | None = None) -> None:
    """Save a sharded language model as a torch_dist checkpoint, whole or not at all. All ranks call this.

    Args:
        chunks: this rank's pipeline chunks.
        topology: how all ranks agree on the folder; None: over the default group, which must talk on the host.

    Raises:
        ReGateError: see :func:`~regate_megatron.ranks.publishing.filled_by_all_ranks`; on every rank.
    """
    from megatron.core import dist_checkpointing

    with filled_by_all_ranks(Path(directory), "saving a language model", topology or whole_world()) as aside:
        tensors = {f"chunk{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
        dist_checkpointing.save(tensors, str(aside))
        if dist.get_rank() == 0:
            write_own(aside, chunks[0])


class _IndexReader(pickle.Unpickler):
    """Reads torch's checkpoint index, and nothing that would import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module in _INDEX_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:  # its own classes, not what it imports
                return found
        raise pickle.UnpicklingError(f"it would import {module}.{name}")


def _check_index(index: Path, what: str) -> None:
    """Refuse an index that is damaged, names anything but torch's checkpoint metadata, or points out of its folder."""
    try:
        with index.open("rb") as file:
            found = _IndexReader(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}")
        for name in {place.relative_path for place in (found.storage_data or {}).values()}:
            if not name or name == ".." or PurePosixPath(name).name != name:
                raise pickle.UnpicklingError(f"it points at {name}")
    except Exception as error:  # damaged pickles raise whatever they like
        raise refuse(
            what,
            given=f"{index}, unreadable or untrusted: {error}",
            allowed="an index written by torch.distributed.checkpoint",
            change="to a complete checkpoint you trust, saved by Megatron",
        ) from error
