"""A Hugging Face folder: ``config.json`` and safetensors, in one file or in shards with an index. Read lazily."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.teacher.weights import TRACKER

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
SHARD_BYTES = 4 << 30  # largest output file; one shard is held in memory while it is written
# What a tokenizer and generation need; copied beside the weights.
_COMPANIONS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_COMPANIONS += ("generation_config.json", "chat_template.*")
_IMAGES = ("preprocessor_config.json", "processor_config.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint by name; only headers are read until a tensor is asked for.

    Args:
        folder: what ``save_pretrained`` wrote.

    Raises:
        ReGateError: no such folder, no safetensors, or a file is missing, truncated or disagrees with the index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise self._refuse("which is no folder", "a folder with config.json and safetensors", "the path")
        self.config = read_config(self.path, "--source")
        self._file_of: dict[str, Any] = {}
        for name, expected in self._files().items():
            try:
                file = safe_open(str(self.path / name), framework="pt")
            except FileNotFoundError as error:
                raise self._broken(name, "is missing") from error
            except (SafetensorError, OSError) as error:
                raise self._broken(name, f"is truncated or damaged ({error})") from error
            found = set(file.keys())
            if lost := sorted(expected - found):
                raise self._broken(name, f"lacks {lost[0]}, which {INDEX} places in it")
            self._file_of.update(dict.fromkeys(expected or found, file))

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header.

        Raises:
            ReGateError: no floating-point type of 16 bits or more: quantized.
        """
        kind = self._file_of[name].get_slice(name).get_dtype()
        if kind not in _DTYPES:
            given = f"whose {name} is {kind}"
            raise self._refuse(given, f"weights in {', '.join(_DTYPES)}", "to the unquantized release")
        return _DTYPES[kind]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file."""
        return self._file_of[name].get_tensor(name)

    def companions(self) -> list[Path]:
        """Files of the tokenizer and for generation."""
        return companions_of(self.path)

    def _files(self) -> dict[str, set[str]]:
        """File names, and the tensors the index places in each; no tensors: all there are."""
        if (self.path / INDEX).is_file():
            files: dict[str, set[str]] = {}
            index = _read_json(self.path, INDEX, "--source")
            places = index.get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise self._broken(INDEX, "has no weight_map of tensors to files")
            for tensor, name in places.items():
                if Path(name).name != name:
                    raise self._broken(INDEX, f"points at {name}, outside the folder")
                files.setdefault(name, set()).add(tensor)
            return files
        if (self.path / SINGLE).is_file():
            return {SINGLE: set()}
        if (self.path / TRACKER).is_file():
            given = "which is a Megatron checkpoint"
            raise self._refuse(given, "safetensors of Hugging Face", "the command: --to-hf, or tools/export_student.py")
        pickled = any(self.path.glob("*.bin"))
        raise self._refuse(
            "whose weights are pickles (*.bin)" if pickled else "which holds no model.safetensors and no index",
            "safetensors",
            "it: save_pretrained of transformers writes them" if pickled else "the path",
        )

    def _broken(self, name: str, reason: str) -> ReGateError:
        return self._refuse(f"whose {name} {reason}", "a complete checkpoint", "it: copy or download it again")

    def _refuse(self, given: str, allowed: str, change: str) -> ReGateError:
        return refuse("--source", given=f"{self.path}, {given}", allowed=allowed, change=change)


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        ReGateError: there is none, or it is damaged.
    """
    return _read_json(folder, CONFIG, what)


def companions_of(folder: Path, *, images: bool = False) -> list[Path]:
    """Files of the tokenizer and for generation in a Hugging Face folder; with ``images``, of the processor too."""
    patterns = (*_COMPANIONS, *_IMAGES) if images else _COMPANIONS
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def write_companions(folder: Path, companions: Iterable[Path], config: dict[str, Any]) -> None:
    """Copy the files of a tokenizer into ``folder``, and write its ``config.json``."""
    for file in companions:
        shutil.copyfile(file, folder / file.name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read_json(folder: Path, name: str, what: str) -> dict[str, Any]:
    form = {"allowed": f"a folder with a {name}", "change": "the path"}
    try:
        value = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise refuse(what, given=f"{folder}, whose {name} is missing or no JSON", **form) from error
    if not isinstance(value, dict):
        raise refuse(what, given=f"{folder}, whose {name} is no JSON object", **form)
    return value


def write_safetensors(
    folder: Path,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    progress: Callable[[int], Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors in the order of ``sizes``, a new file whenever one would exceed ``shard_bytes``.

    Args:
        sizes: bytes of every tensor, in the order in which ``tensors`` gives them.
        tensors: name and contiguous value; one file's worth is held at a time.
        progress: called with the number of bytes written since its last call.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    source = iter(tensors)
    total, weight_map = len(shards), {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        batch = {}
        for expected in names:
            name, value = next(source)
            assert name == expected, (name, expected)
            batch[name] = value
        try:
            save_file(batch, str(folder / file), metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(names, file)
        progress(sum(sizes[name] for name in names))
    if total > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
