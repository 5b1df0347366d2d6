"""Folders to be written: checked first, filled aside, renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.ranks.publishing import claimed, replace_folder

TRACKER = "latest_checkpointed_iteration.txt"
# One of these marks a folder as a checkpoint, which --overwrite may replace.
_MARKS = (TRACKER, "metadata.json", "model.safetensors", "model.safetensors.index.json")


def check_target(target: str | Path, *, sources: tuple[Path, ...], overwrite: bool, num_bytes: int) -> None:
    """Refuse a target before anything is written.

    Args:
        target: the folder to be made.
        sources: folders that are read; the target may not hold one or lie in one.
        overwrite: whether a checkpoint at ``target`` may be replaced.
        num_bytes: what will be written.

    Raises:
        ReGateError: it exists, cannot be made, or the disk is too small.
    """
    target = Path(target).absolute()
    form = {"allowed": "a new folder, or a checkpoint together with --overwrite", "change": "the path"}
    real = target.resolve()
    for source in (path.resolve() for path in sources):
        if source.is_relative_to(real) or real.is_relative_to(source):
            raise refuse("--target", given=f"{target}, which holds or lies in the source", **form)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not any((target / name).is_file() for name in _MARKS):
            raise refuse("--target", given=f"{target}, which exists and is no checkpoint", **form)
        if not overwrite:
            form["change"] = "the path, or add --overwrite"
            raise refuse("--target", given=f"{target}, which exists", **form)
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(target, f"{parent} is no folder that can be written", num_bytes)
    if shutil.disk_usage(parent).free < num_bytes:
        raise _unwritable(target, "too little space on its disk", num_bytes)


@contextmanager
def new_folder(target: str | Path, *, sources: tuple[Path, ...], overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """Give a folder aside to fill; it takes the place of ``target`` at the end. After an error nothing is left.

    A killed run leaves ``TARGET.incomplete``, which the next one clears; a folder of that name that is not of these
    tools, or that another run is filling, is left alone.

    Raises:
        ReGateError: see :func:`check_target`; or writing failed.
    """
    target = Path(target).absolute()
    check_target(target, sources=sources, overwrite=overwrite, num_bytes=num_bytes)
    aside = target.with_name(target.name + ".incomplete")
    try:
        with claimed(aside, "--target") as mark:
            yield aside
            mark.unlink()
            _to_disk(aside)
            if target.is_dir() and not any(target.iterdir()):
                target.rmdir()
            replace_folder(aside, target)
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error), num_bytes) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # how torch.save reports a full disk
            raise
        raise _unwritable(target, "its disk is full, or a file too large", num_bytes) from error


def _to_disk(folder: Path) -> None:
    """Files must be on the disk before the rename makes them count."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _unwritable(target: Path, reason: str, num_bytes: int) -> ReGateError:
    return refuse(
        "--target",
        given=f"{target}: {reason}",
        allowed=f"a folder that can be written, with {num_bytes / 2**30:.1f} GiB free",
        change="the path or its permissions",
    )
