"""What was learned travels in Megatron's checkpoints: a folder ``regate`` inside the folder of the iteration.

Megatron's own files, keys and names stay as they are, so plain Megatron loads such a checkpoint and does not notice.
A checkpoint is complete when Megatron's tracker file names its iteration, so the folder must be in place just before:

- every rank writes its part beside the iteration's folder, in ``SAVE/regate_incomplete_…``;
- when all parts and their manifest are on the disk, rank 0 renames that folder into the iteration's, as its last act
  before the tracker file is written.

Symbols wrapped, each where it is looked up late:

- ``training.save_checkpoint``: all ranks, every format (``generate_state_dict`` is called on some ranks only).
- ``checkpointing.get_checkpoint_tracker_filename``: in a synchronous save rank 0 calls it when all ranks have written
  theirs, to write the tracker file.
- ``checkpointing.schedule_async_save``: in an asynchronous save, a function of ours goes before those that Megatron
  calls when all is written, of which one writes the tracker file.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from regate_megatron.checkpoint import saved_arguments
from regate_megatron.errors import refuse
from regate_megatron.session import Session
from regate_megatron.state import STATE_FOLDER, StateSave, has_state, load_state
from regate_megatron.topology import agree_on_error

_ASIDE = "regate_incomplete_"


class CheckpointState:
    """Puts the state of the one session in ``sessions`` into checkpoints."""

    def __init__(self, sessions: list[Session]) -> None:
        self._sessions = sessions
        self._staged: _Staged | None = None
        self._cleaned: set[Path] = set()

    def wrap_save(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``training.save_checkpoint``: stage the state first; all ranks."""
        signature = inspect.signature(inner)

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args, print_rank_0

            given, options = signature.bind(*args, **kwargs).arguments, get_args()
            folder = _save_folder(options, is_non_persistent=given.get("non_persistent_ckpt", False))
            if folder is None:
                print_rank_0("[regate] difficulty is not saved in local (non-persistent) checkpoints")
            if folder is None or not self._sessions or given.get("release"):
                return inner(*args, **kwargs)
            staged = self._staged = self._stage(folder, given["iteration"])
            if not options.async_save:
                staged.save.write()
                staged.save.finish()
            result = inner(*args, **kwargs)
            assert self._staged is None or dist.get_rank() > 0, "the checkpoint was completed without our state"
            self._staged = None
            return result

        return save_checkpoint

    def wrap_tracker(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``checkpointing.get_checkpoint_tracker_filename``: in a synchronous save on rank 0, publish first."""

        def get_checkpoint_tracker_filename(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            staged = self._staged
            if staged is not None and not get_args().async_save and dist.get_rank() == 0:
                self._staged = None
                staged.publish()
            return inner(*args, **kwargs)

        return get_checkpoint_tracker_filename

    def wrap_schedule(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``checkpointing.schedule_async_save``: write in a thread meanwhile, publish when Megatron has written."""

        def schedule_async_save(request: Any, *args: Any, **kwargs: Any) -> Any:
            staged, self._staged = self._staged, None
            if staged is None:
                return inner(request, *args, **kwargs)

            def publish_state() -> None:
                staged.save.finish()
                if dist.get_rank() == 0:
                    staged.publish()

            request.finalize_fns.insert(0, publish_state)
            result = inner(request, *args, **kwargs)
            staged.save.write(in_background=True)  # after Megatron has forked its writer
            return result

        return schedule_async_save

    def _stage(self, folder: Path, iteration: int) -> _Staged:
        from megatron.training.checkpointing import get_checkpoint_name

        if folder not in self._cleaned and dist.get_rank() == 0:
            for left in folder.glob(_ASIDE + "*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._cleaned.add(folder)
        target = Path(get_checkpoint_name(str(folder), iteration, return_base_dir=True)) / STATE_FOLDER
        save = StateSave(self._sessions[0], folder / f"{_ASIDE}{iteration:07d}", iteration)
        return _Staged(save, target)


class _Staged:
    """A save and where it goes."""

    def __init__(self, save: StateSave, target: Path) -> None:
        self.save, self.target = save, target

    def publish(self) -> None:
        self.save.publish(self.target)


def restore(session: Session, options: Any) -> str | None:
    """Continue from the state in the checkpoint Megatron has loaded; returns a line to print, None for a new run.

    All ranks call this, once weights are loaded.

    Raises:
        ReGateError: the saved state is damaged, or missing from a checkpoint of a ReGATE run; on every rank.
    """
    if not options.iteration:
        return None
    reset = session.config.reset_difficulty
    folder = None if reset else _find_state(session, options)
    if folder is not None:
        what = load_state(session, folder)
    else:
        what = "difficulty starts empty (" + ("--regate-reset-difficulty)" if reset else "the checkpoint holds none)")
        what += "; dense steps come first" if session.config.learns else ""
        session.resume(options.iteration)
    return f"[regate] resumed at iteration {options.iteration}: {what}"


def _find_state(session: Session, options: Any) -> Path | None:
    from megatron.training.checkpointing import get_checkpoint_name

    roots = [getattr(options, "load", None), _non_persistent_root(options, getattr(options, "load", None))]
    for root in dict.fromkeys(root for root in roots if root):
        folder = Path(get_checkpoint_name(str(root), options.iteration, return_base_dir=True)) / STATE_FOLDER
        if has_state(folder, session.topology):
            return folder
        _check_plain(folder.parent, session)
    return None


def _check_plain(iteration: Path, session: Session) -> None:
    """Refuse a checkpoint whose own arguments say that ReGATE was on: its folder got lost. All ranks call this.

    Megatron's legacy format keeps its arguments in a pickle, which is not read here.
    """
    error = None
    if dist.get_rank() == 0 and iteration.is_dir() and getattr(saved_arguments(iteration), "regate", False):
        error = str(
            refuse(
                "saved difficulty",
                given=f"{iteration} of a run with --regate, without its folder {STATE_FOLDER}",
                allowed="the complete checkpoint as it was saved",
                change="the copy, or add --regate-reset-difficulty to start with empty difficulty",
            )
        )
    agree_on_error(error, session.topology)


def _save_folder(options: Any, *, is_non_persistent: bool) -> Path | None:
    """Where this save puts its iterations; None where every node keeps its own."""
    if not is_non_persistent:
        return Path(options.save)
    root = _non_persistent_root(options, options.save)
    return None if root is None else Path(root)


def _non_persistent_root(options: Any, beside: str | None) -> str | None:
    from megatron.training.checkpointing import _NON_PERSISTENT_CKPT_SUBDIR

    if getattr(options, "non_persistent_ckpt_type", None) != "global":
        return None
    given = getattr(options, "non_persistent_global_ckpt_dir", None)
    return given or (str(Path(beside) / _NON_PERSISTENT_CKPT_SUBDIR) if beside else None)
