"""Take the language model out of a LLaVA checkpoint, byte for byte.

A torch_dist checkpoint is an index (``.metadata``) and data files; the index says for every piece of every tensor, and
for every saved object, in which file its bytes lie and how many there are. Extraction copies those byte ranges as they
are and writes an index with the new names: nothing is decoded, so the copy is bit-exact whatever the precision or the
sharding, no model is built, the vision tower is not read, and memory use does not depend on the size of the model.

Kept: every tensor and object whose name starts with ``language_model.`` (its optimizer state's names do not), and the
common state that Megatron's loader reads its arguments from. The copy is laid out as a Megatron checkpoint folder,
marked "release": loaders start it at iteration 0 and ask for neither optimizer nor random state.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from regate_megatron.checkpoints import targets
from regate_megatron.checkpoints.targets import TRACKER as _TRACKER
from regate_megatron.checkpoints.targets import new_folder
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.teacher.checkpoint import EMBEDDING, LANGUAGE_MODEL_PREFIX, find_iteration
from regate_megatron.teacher.settings import SETTINGS_FILES

_COMMON_STATE = "common_state/"  # an object inside the checkpoint since megatron-core 0.19, before that a file:
_COMMON_FILE = "common.pt"
_RELEASE = "release"
_PIECE = 16 << 20  # bytes copied at a time


@dataclass(frozen=True)
class Extraction:
    """What there is to copy.

    Attributes:
        path: folder of the source's iteration.
        metadata: torch's index of the copy, its entries still pointing into the source.
        shapes: global shape of every tensor of the language model, by its new name.
        num_parameters: elements of those tensors.
        num_bytes: bytes of the data files to be written.
    """

    path: Path
    metadata: Any
    shapes: dict[str, tuple[int, ...]]
    num_parameters: int
    num_bytes: int


def plan_extraction(source: str | Path, what: str = "--source") -> Extraction:
    """Find the language model in ``source``; reads the index only. One process, no communication.

    Args:
        source: a torch_dist checkpoint of a LLaVAModel: its folder, or that of one iteration.
        what: the option to name in a refusal.

    Raises:
        ReGateError: no checkpoint, another format, or no language model beside a vision tower in it.
    """
    from torch.distributed.checkpoint import FileSystemReader

    path = find_iteration(source, what)
    index = FileSystemReader(str(path)).read_metadata()
    new_name = {name: _new_name(name) for name in index.state_dict_metadata}
    entries = {new_name[name]: entry for name, entry in index.state_dict_metadata.items() if new_name[name]}
    if EMBEDDING not in entries:
        is_gpt = EMBEDDING in index.state_dict_metadata
        raise refuse(
            what,
            given=f"{path}, which is a language model already" if is_gpt else f"{path}, which holds no language model",
            allowed=f"a checkpoint of a LLaVAModel (it has {LANGUAGE_MODEL_PREFIX}{EMBEDDING})",
            change="nothing: name it as the teacher as it is" if is_gpt else "the path",
        )
    storage = {
        dataclasses.replace(place, fqn=new_name[place.fqn]): info
        for place, info in index.storage_data.items()
        if new_name[place.fqn]
    }
    for info in storage.values():
        if len(PurePosixPath(info.relative_path).parts) != 1 or info.relative_path == "..":
            raise refuse(
                what,
                given=f"{path}, whose index points at {info.relative_path}",
                allowed="data files beside the index",
                change="to a checkpoint you trust, saved by Megatron",
            )
    shapes = {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    # planner_data maps names to nested dictionaries of the saver; Megatron loads by name.
    metadata = dataclasses.replace(
        index, state_dict_metadata=entries, storage_data=storage, planner_data=None, storage_meta=None
    )
    return Extraction(
        path=path,
        metadata=metadata,
        shapes=shapes,
        num_parameters=sum(entries[name].size.numel() for name in shapes),
        num_bytes=sum(info.length for info in storage.values()),
    )


def extract(
    extraction: Extraction, target: str | Path, *, overwrite: bool = False, progress: Callable[[int], Any] | None = None
) -> Path:
    """Write the language model to ``target``; aside first, then renamed. One process, no communication.

    Args:
        extraction: what :func:`plan_extraction` found.
        target: the new checkpoint folder.
        overwrite: whether a checkpoint at ``target`` may be replaced.
        progress: called with the number of bytes copied since its last call.

    Returns:
        the folder of the checkpoint's only iteration.

    Raises:
        ReGateError: see ``targets.check_target``; the target cannot be written, or the source ends early. Nothing is
            left behind then.
    """
    sources, num_bytes = (extraction.path,), extraction.num_bytes
    with new_folder(target, sources=sources, overwrite=overwrite, num_bytes=num_bytes) as aside:
        _write(extraction, aside, progress or (lambda count: None))
    return Path(target).absolute() / _RELEASE


def check_target(extraction: Extraction, target: str | Path, *, overwrite: bool) -> None:
    """Refuse a target that :func:`extract` would refuse; see ``targets.check_target``."""
    targets.check_target(target, sources=(extraction.path,), overwrite=overwrite, num_bytes=extraction.num_bytes)


def _new_name(name: str) -> str | None:
    """The name in the copy; None for what stays behind."""
    if name.startswith(_COMMON_STATE):
        return name
    return name[len(LANGUAGE_MODEL_PREFIX) :] if name.startswith(LANGUAGE_MODEL_PREFIX) else None


def _write(extraction: Extraction, root: Path, progress: Callable[[int], Any]) -> None:
    folder = root / _RELEASE
    folder.mkdir(parents=True)
    storage = dict(extraction.metadata.storage_data)
    places_by_file: dict[str, list[Any]] = {}
    for place, info in storage.items():
        places_by_file.setdefault(info.relative_path, []).append(place)
    for name, places in sorted(places_by_file.items()):
        places.sort(key=lambda place: storage[place].offset)  # one pass through each file
        with _open_source(extraction.path / name) as old, (folder / name).open("wb") as new:
            for place in places:
                info = storage[place]
                storage[place] = dataclasses.replace(info, offset=new.tell())
                _copy(old, new, info, progress)
            _flush(new)
    for name in ("metadata.json", _COMMON_FILE, *SETTINGS_FILES):
        if (extraction.path / name).is_file():
            shutil.copyfile(extraction.path / name, folder / name)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(dataclasses.replace(extraction.metadata, storage_data=storage), file)
        _flush(file)
    (root / _TRACKER).write_text(_RELEASE)


def _open_source(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error


def _copy(old: Any, new: Any, info: Any, progress: Callable[[int], Any]) -> None:
    old.seek(info.offset)
    left = info.length
    while left:
        piece = old.read(min(left, _PIECE))
        if not piece:
            raise _broken(Path(old.name), f"ends {left} bytes early")
        new.write(piece)
        left -= len(piece)
        progress(len(piece))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())  # before the rename makes it count


def _broken(path: Path, reason: str) -> ReGateError:
    return refuse("--source", given=f"{path}: {reason}", allowed="a complete checkpoint", change="it")
