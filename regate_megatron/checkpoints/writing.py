"""Folders to be written: checked first, filled aside, renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.ranks.publishing import claimed, replace_folder
from regate_megatron.teacher.weights import TRACKER

# One of these marks a folder as a checkpoint, which --overwrite may replace.
_MARKS = (TRACKER, "metadata.json", "model.safetensors", "model.safetensors.index.json")


class Plan(Protocol):
    """What a tool is about to write.

    Attributes:
        source: the folder that is read; the target may not hold it or lie in it.
        num_bytes: what will be written.
    """

    @property
    def source(self) -> Path: ...

    @property
    def num_bytes(self) -> int: ...

    def fill(self, folder: Path, progress: Callable[[int], Any]) -> None:
        """Write into an empty folder; ``progress`` is called with the number of bytes written since its last call."""


def check_target(plan: Plan, target: str | Path, *, overwrite: bool) -> None:
    """Refuse a target before anything is written.

    Args:
        target: the folder to be made.
        overwrite: whether a checkpoint at ``target`` may be replaced.

    Raises:
        ReGateError: it exists, cannot be made, or the disk is too small.
    """
    target = Path(target).absolute()
    form = {"allowed": "a new folder, or a checkpoint together with --overwrite", "change": "the path"}
    real, source = target.resolve(), plan.source.resolve()
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
        raise _unwritable(target, f"{parent} is no folder that can be written", plan.num_bytes)
    if shutil.disk_usage(parent).free < plan.num_bytes:
        raise _unwritable(target, "too little space on its disk", plan.num_bytes)


def write(plan: Plan, target: str | Path, *, overwrite: bool, progress: Callable[[int], Any]) -> None:
    """Fill a folder aside, which takes the place of ``target`` at the end. After an error nothing is left.

    A killed run leaves ``TARGET.incomplete``, which the next one clears; a folder of that name that is not of these
    tools, or that another run is filling, is left alone.

    Raises:
        ReGateError: see :func:`check_target`; or writing failed, or a source is damaged.
    """
    target = Path(target).absolute()
    check_target(plan, target, overwrite=overwrite)
    aside = target.with_name(target.name + ".incomplete")
    try:
        with claimed(aside, "--target") as mark:
            plan.fill(aside, progress)
            mark.unlink()
            _to_disk(aside)
            if target.is_dir() and not any(target.iterdir()):
                target.rmdir()
            replace_folder(aside, target)
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error), plan.num_bytes) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # how torch.save reports a full disk
            raise
        raise _unwritable(target, "its disk is full, or a file too large", plan.num_bytes) from error


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
