"""Files and folders that appear whole or not at all: written aside, renamed when complete and on the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch.distributed as dist

from regate_megatron.errors import refuse

if TYPE_CHECKING:
    from regate_megatron.ranks.topology import Topology

_MARK = ".regate-incomplete"


@contextmanager
def claimed(aside: Path, what: str) -> Iterator[Path]:
    """An empty folder with a mark in it, locked until the block ends; the folder is gone then. One process calls this.

    A killed run leaves the folder with its mark, and the next one clears it.

    Args:
        aside: the folder.
        what: the option to name in a refusal.

    Yields:
        the mark, a file.

    Raises:
        ReGateError: the folder exists without the mark, or another run has it.
    """
    mark = aside / _MARK
    if aside.exists() and not mark.is_file():
        given = f"{aside}, which exists and is not of these tools, but is where they write first"
        raise refuse(what, given=given, allowed="a name that is free there", change="the path, or move it away")
    aside.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            given = f"{aside}, which another run is writing"
            raise refuse(what, given=given, allowed="one run at a time", change="the path, or wait") from error
        except OSError:  # a filesystem without locks
            pass
        try:
            for path in aside.iterdir():
                if path != mark:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield mark
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def filled_by_all_ranks(target: Path, what: str, topology: Topology) -> Iterator[Path]:
    """A folder that ranks fill together; it takes the place of ``target`` at the end. All ranks call this, in step.

    Rank 0 claims ``TARGET.incomplete`` and renames what was filled in it; the others hear whether it could.

    Args:
        target: the folder to be made, on a file system that all ranks see.
        what: to name in a refusal.

    Yields:
        the folder to fill.

    Raises:
        ReGateError: it cannot be made, see :func:`claimed`; on every rank.
    """
    aside = target.with_name(target.name + ".incomplete")
    inside = aside / target.name  # apart from the mark: a saver may want its folder empty
    form = {"allowed": "a folder that can be written", "change": "the path or its permissions"}
    with ExitStack() as claim:
        with topology.together(what, **form):
            if dist.get_rank() == 0:
                claim.enter_context(claimed(aside, what))
                inside.mkdir()
        yield inside
        with topology.together(what):
            pass  # all have written
        with topology.together(what, **form):
            if dist.get_rank() == 0:
                replace_folder(inside, target)


def replace_folder(aside: Path, target: Path) -> None:
    """Put the finished folder ``aside`` in the place of ``target``; the old one goes last."""
    if not target.exists():
        os.rename(aside, target)
        _sync_folder(target.parent)
        return
    old = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.replaced")  # a name that nobody's backup has
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        os.rename(old, target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written_aside(path: Path, *, first_wins: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which is at ``path``, whole and on the disk, once the block has ended; one process calls this.

    Args:
        first_wins: keep the file that another process has put there meanwhile.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not (first_wins and _linked(aside, path)):
            os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_aside(path: Path, data: Any, *, first_wins: bool = False) -> None:
    """Put bytes at ``path``; see :func:`written_aside`."""
    with written_aside(path, first_wins=first_wins) as file:
        file.write(data)


def _linked(aside: Path, path: Path) -> bool:
    """Give ``aside`` the name ``path`` unless it is taken; False on a file system without hard links."""
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
