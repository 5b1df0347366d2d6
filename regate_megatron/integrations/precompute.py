"""Fill the reference-loss cache with a script's own data, in the place of its training loop.

The script runs as for training: its model, datasets, samplers, order and number of iterations are its own. Two
functions of ``megatron.training.training`` are replaced, on top of what :mod:`.megatron_lm` wraps:

- ``setup_model_and_optimizer``: as with ``--skip-train`` neither DDP buffers nor an optimizer are built. The student is
  built: batches are read by its settings and the teacher is made from its architecture; it takes the memory of its
  weights.
- ``train``: pulls each iteration's batches on the planners and has the teacher score what the cache lacks.

No checkpoint is saved and nothing is evaluated. Progress is noted beside the cache once all planners have written: the
same command goes on behind it, through Megatron's own ``consumed_train_samples``. With another command nothing is lost
either: what is cached is only looked up.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from tqdm import tqdm

from regate_megatron.api import session_of
from regate_megatron.config import ReGateConfig, flag
from regate_megatron.errors import refuse
from regate_megatron.ranks.publishing import write_aside
from regate_megatron.step.session import Session

NOTES = "progress"
_SECONDS_BETWEEN_NOTES = 60


def install(config: ReGateConfig) -> None:
    """Replace the two functions; after :func:`megatron_lm.install`, in a process that does nothing else.

    Raises:
        ReGateError: there is nothing to fill or nobody to score; every rank raises.
    """
    from megatron.training import training

    if not config.enabled or config.reference_cache is None or not config.needs_teacher:
        given = f"{flag('score')} {config.score}" if config.ranks_targets else "a run that leaves no answer token out"
        given = "no directory" if config.reference_cache is None else given
        given = given if config.enabled else "settings that say off"
        error = refuse(
            flag("reference_cache"),
            given=given,
            allowed="a directory, and answer tokens ranked by a score that needs the teacher",
            change=f"the command: give {flag('reference_cache')} a folder, and {flag('score')} such a score",
        )
        error.everywhere = True
        raise error
    note = Path(config.reference_cache) / NOTES / f"{_hash_of_command()}.json"
    training.setup_model_and_optimizer = _without_optimizer(training.setup_model_and_optimizer, note)
    training.train = _score_instead(training.train, note)


def _without_optimizer(inner: Callable[..., Any], note: Path) -> Callable[..., Any]:
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0
        from megatron.training.training import update_train_iters

        options = get_args()
        trains, options.save = options.skip_train, None
        options.skip_train = options.no_load_optim = options.no_load_rng = True
        result = inner(*args, **kwargs)
        options.skip_train = trains
        if options.train_iters is None:  # given in samples: the learning-rate scheduler would have counted them
            update_train_iters(options)
        done = [_read(note)]
        dist.broadcast_object_list(done, src=0, group=session_of(result[0]).topology.world_group)
        if done[0] and done[0]["iteration"] > options.iteration:
            # Megatron builds its data loaders behind what was consumed.
            options.iteration, options.consumed_train_samples = done[0]["iteration"], done[0]["samples"]
            print_rank_0(f"[regate] precomputing goes on at iteration {options.iteration}")
        return result

    return setup_model_and_optimizer


def _score_instead(inner: Callable[..., Any], note: Path) -> Callable[..., Any]:
    signature = inspect.signature(inner)

    def train(*args: Any, **kwargs: Any) -> tuple[int, int]:
        from megatron.core.num_microbatches_calculator import get_num_microbatches, update_num_microbatches
        from megatron.training import get_args

        options, given = get_args(), signature.bind(*args, **kwargs).arguments
        session, iterator = session_of(given["model"]), given["train_data_iterator"]
        topology, iteration, written = session.topology, options.iteration, time.monotonic()
        bar = tqdm(
            total=options.train_iters,
            initial=iteration,
            unit="iteration",
            desc="reference losses",
            disable=dist.get_rank() != 0,
            mininterval=1.0,
        )
        while iteration < options.train_iters:
            update_num_microbatches(options.consumed_train_samples, consistency_check=True, verbose=True)
            number = get_num_microbatches()
            session.score_only(
                {
                    "data_iterator": iterator if session.planner else None,  # no other rank looks at the data
                    "num_microbatches": number,
                    "micro_batch_size": options.micro_batch_size,
                }
            )
            iteration += 1
            options.consumed_train_samples += topology.dp_size * options.micro_batch_size * number
            bar.update()
            is_due = iteration == options.train_iters or time.monotonic() - written > _SECONDS_BETWEEN_NOTES
            with topology.together("precompute") as stage:
                stage.wish = is_due
            if stage.anyone_wishes:
                with topology.together("writing reference losses"):
                    session.flush()  # on all planners, before the note says so
                form = {"allowed": "a folder that can be written", "change": f"the permissions of {note.parent}"}
                with topology.together("noting progress", **form):
                    if dist.get_rank() == 0:
                        note.parent.mkdir(exist_ok=True)
                        state = {"iteration": iteration, "samples": options.consumed_train_samples}
                        write_aside(note, json.dumps(state).encode())
                written = time.monotonic()
        bar.close()
        _say_what_was_done(session)
        options.do_valid = options.do_test = False
        return 0, 0  # no iteration has been trained: nothing is saved

    return train


def _say_what_was_done(session: Session) -> None:
    counts = [0, 0]
    if session.planner:
        counts = [session.reference.num_found, session.reference.num_computed]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, counts, group=session.topology.world_group)
    if dist.get_rank() == 0:
        found, computed = (sum(part[number] for part in parts) for number in range(2))
        print(f"[regate] precomputed: {computed:,} samples by the teacher, {found:,} found in the cache", flush=True)


def _hash_of_command() -> str:
    """Of the script and its flags: with the same ones the data come in the same order."""
    return xxhash.xxh3_128_hexdigest("\0".join(sys.argv).encode())


def _read(note: Path) -> dict[str, int] | None:
    try:
        state = json.loads(note.read_text())
        return {name: int(state[name]) for name in ("iteration", "samples")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
