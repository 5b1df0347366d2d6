"""What was learned travels in the host's checkpoints: a folder ``regate`` inside the folder of the iteration.

The host's own files, keys and names stay as they are, so plain Megatron loads such a checkpoint and does not notice.
A checkpoint is complete when the tracker file names its iteration, so the folder must be in place just before:

- every rank writes its part beside the iteration's folder, in ``SAVE/regate_incomplete_…``;
- when all parts and their manifest are on the disk, rank 0 renames that folder into the iteration's, as its last act
  before the tracker file is written.

Megatron-LM and Megatron-Bridge have the same three functions, and each looks them up late. A callback would be too late
(Bridge's ``on_checkpoint_save`` comes when the tracker file has been written), so they are wrapped:

- ``save_checkpoint``: all ranks, every format (``generate_state_dict`` is called on some ranks only).
- ``get_checkpoint_tracker_filename``: in a synchronous save rank 0 calls it when all ranks have written theirs, to
  write the tracker file.
- ``schedule_async_save``: in an asynchronous save, a function of ours goes before those that the host calls when all is
  written, of which one writes the tracker file.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from regate_megatron.errors import refuse
from regate_megatron.memory.state import STATE_FOLDER, StateSave, has_state
from regate_megatron.step.session import Session
from regate_megatron.step.state import begin_save, load_state
from regate_megatron.support import HostRun
from regate_megatron.teacher.weights import saved_arguments

_ASIDE = "regate_incomplete_"
_NON_PERSISTENT = "non_persistent"  # below the folder of the checkpoints, in both hosts


class CheckpointState:
    """Puts the state of the one session in ``sessions`` into checkpoints.

    Args:
        sessions: the session, once there is one.
        host: from the arguments of a call of ``save_checkpoint``, what the host tells of its run.
    """

    def __init__(self, sessions: list[Session], host: Callable[[Mapping[str, Any]], HostRun]) -> None:
        self._sessions, self._host = sessions, host
        self._staged: _Staged | None = None
        self._cleaned: set[Path] = set()

    @property
    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """What wraps the three functions, by their names."""
        return {
            "save_checkpoint": self.wrap_save,
            "get_checkpoint_tracker_filename": self.wrap_tracker,
            "schedule_async_save": self.wrap_schedule,
        }

    def wrap_save(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``save_checkpoint``: bring to the disk what waits for it and stage the state first; all ranks."""
        signature = inspect.signature(inner)

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            run = self._host(given)
            for session in self._sessions:
                session.flush()
            folder = _save_folder(run, is_non_persistent=given.get("non_persistent_ckpt", False))
            if folder is None and dist.get_rank() == 0:
                print("[regate] difficulty is not saved in local (non-persistent) checkpoints", flush=True)
            if folder is None or not self._sessions or given.get("release"):
                return inner(*args, **kwargs)
            staged = self._staged = self._stage(folder, run.iteration, is_async=run.async_save)
            if not staged.is_async:
                staged.save.write()
                staged.save.finish()
            result = inner(*args, **kwargs)
            assert self._staged is None or dist.get_rank() > 0, "the checkpoint was completed without our state"
            self._staged = None
            return result

        return save_checkpoint

    def wrap_tracker(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``get_checkpoint_tracker_filename``: in a synchronous save on rank 0, publish first."""

        def get_checkpoint_tracker_filename(*args: Any, **kwargs: Any) -> Any:
            staged = self._staged
            if staged is not None and not staged.is_async and dist.get_rank() == 0:
                self._staged = None
                staged.publish()
            return inner(*args, **kwargs)

        return get_checkpoint_tracker_filename

    def wrap_schedule(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``schedule_async_save``: write in a thread meanwhile, publish when the host has written."""
        signature = inspect.signature(inner)

        def schedule_async_save(*args: Any, **kwargs: Any) -> Any:
            staged, self._staged = self._staged, None
            if staged is None:
                return inner(*args, **kwargs)

            def publish_state() -> None:
                staged.save.finish()
                if dist.get_rank() == 0:
                    staged.publish()

            request = signature.bind(*args, **kwargs).arguments["async_request"]
            request.finalize_fns.insert(0, publish_state)
            result = inner(*args, **kwargs)
            staged.save.write(in_background=True)  # after the host has forked its writer
            return result

        return schedule_async_save

    def _stage(self, folder: Path, iteration: int, *, is_async: bool) -> _Staged:
        if folder not in self._cleaned and dist.get_rank() == 0:
            for left in folder.glob(_ASIDE + "*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._cleaned.add(folder)
        save = begin_save(self._sessions[0], folder / f"{_ASIDE}{iteration:07d}", iteration)
        return _Staged(save, _iteration_folder(folder, iteration) / STATE_FOLDER, is_async)


class _Staged:
    """A save, where it goes, and whether the host writes its own part asynchronously."""

    def __init__(self, save: StateSave, target: Path, is_async: bool) -> None:
        self.save, self.target, self.is_async = save, target, is_async

    def publish(self) -> None:
        self.save.publish(self.target)


def restore(session: Session, run: HostRun) -> str | None:
    """Continue from the state in the checkpoint the host has loaded; returns a line to print, None for a new run.

    All ranks call this, once weights are loaded.

    Raises:
        ReGateError: the saved state is damaged, or missing from a checkpoint of a ReGATE run; on every rank.
    """
    if not run.iteration:
        return None
    reset = session.config.reset_difficulty
    folder = None if reset else _find_state(session, run)
    if folder is not None:
        what = load_state(session, folder)
    else:
        what = "difficulty starts empty (" + ("--regate-reset-difficulty)" if reset else "the checkpoint holds none)")
        what += "; dense steps come first" if session.config.learns else ""
        session.resume(run.iteration)
    return f"[regate] resumed at iteration {run.iteration}: {what}"


def _find_state(session: Session, run: HostRun) -> Path | None:
    roots = [run.load, _non_persistent_root(run, run.load)]
    for root in dict.fromkeys(root for root in roots if root is not None):
        folder = _iteration_folder(root, run.iteration) / STATE_FOLDER
        if has_state(folder, session.topology):
            return folder
        _check_plain(folder.parent, session)
    return None


def _check_plain(iteration: Path, session: Session) -> None:
    """Refuse a checkpoint whose own arguments say that ReGATE was on: its folder got lost. All ranks call this.

    Megatron's legacy format keeps its arguments in a pickle, which is not read here.
    """
    with session.topology.together("saved difficulty", allowed="a checkpoint that can be read"):
        if dist.get_rank() == 0 and iteration.is_dir() and getattr(saved_arguments(iteration), "regate", False):
            raise refuse(
                "saved difficulty",
                given=f"{iteration} of a run with --regate, without its folder {STATE_FOLDER}",
                allowed="the complete checkpoint as it was saved",
                change="the copy, or add --regate-reset-difficulty to start with empty difficulty",
            )


def _iteration_folder(root: Path, iteration: int) -> Path:
    """Where both hosts, in every version, keep an iteration; never asked of a release, which has no state."""
    return root / f"iter_{iteration:07d}"


def _save_folder(run: HostRun, *, is_non_persistent: bool) -> Path | None:
    """Where this save puts its iterations; None where every node keeps its own."""
    return _non_persistent_root(run, run.save) if is_non_persistent else run.save


def _non_persistent_root(run: HostRun, beside: Path | None) -> Path | None:
    if not run.keeps_non_persistent:
        return None
    return run.non_persistent_folder or (beside / _NON_PERSISTENT if beside else None)
