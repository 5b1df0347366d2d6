"""The trace: one JSON line per microbatch, of what was kept and why; and a line per step of what was known before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.batches.facts import key_hex
from regate_megatron.config import flag
from regate_megatron.errors import refuse
from regate_megatron.method.plan import MicrobatchPlan
from regate_megatron.step.step import Step


def check_trace_folder(directory: str) -> None:
    """Make the folder of the trace, or refuse it.

    Raises:
        ReGateError: it cannot be made or written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        form = {"allowed": "a folder this process may write", "change": "the path"}
        raise refuse(flag("trace"), given=directory, **form)


class Trace:
    """``DIR/dp00000.jsonl``: one JSON object per microbatch of this data-parallel rank; planners only.

    Beside it ``dp00000.history.csv``, a line per scored step: targets with a history, reference losses found.
    """

    def __init__(self, directory: str, dp_rank: int, dp_size: int) -> None:
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._path = Path(directory) / f"dp{dp_rank:05d}.jsonl"
        self._file: TextIO | None = None
        self._history: TextIO | None = None
        self.continues = False

    def write(self, step: Step) -> None:
        """Write one step, counted from 1 as Megatron does. Rows that context parallelism joined are written apart."""
        if self._file is None:  # opened late: a run from the start begins the file anew, a resumed one goes on in it
            self._file = self._path.open("a" if self.continues else "w", buffering=1)
            if not self.continues:
                self._forget_a_run_before()
        plan_hash = step.plan.digest()
        for index, one in enumerate(step.facts):
            microbatch = step.plan.microbatches[index] if step.plan.is_sparse else None
            joined = one.num_samples if one.joins_rows else 1
            record = {
                "iteration": step.number + 1,
                "phase": step.phase,
                "fallback": step.fallback,
                "dp_rank": self._dp_rank,
                "microbatch": index,
                "dense_length": one.planned_length,
                "kept_length": microbatch.length // joined if microbatch else one.planned_length,
                "plan_hash": plan_hash,
                "rows": self._rows(one, microbatch, step.scores[index].tolist() if step.scores is not None else ()),
            }
            self._file.write(json.dumps(record) + "\n")

        self._write_history(step)

    def _forget_a_run_before(self) -> None:
        """Remove what it left beside this file, and on the first rank the files of ranks that there are no more."""
        self._path.with_suffix(".history.csv").unlink(missing_ok=True)
        for file in self._path.parent.glob("dp*") if self._dp_rank == 0 else ():
            number = file.name[2:].partition(".")[0]
            if file.name.endswith((".jsonl", ".history.csv")) and number.isdigit() and int(number) >= self._dp_size:
                file.unlink(missing_ok=True)

    def _write_history(self, step: Step) -> None:
        """A line beside, of steps that were scored: how much of what the score needs was known already."""
        if step.is_known is None and not step.num_asked:
            return
        known = [int(is_known_X.sum()) for is_known_X in step.is_known or ()]
        targets = sum(one.num_targets for one in step.facts)
        if self._history is None:
            self._history = self._path.with_suffix(".history.csv").open("a" if self.continues else "w", buffering=1)
            if not self._history.tell():
                self._history.write("iteration,targets,targets_with_history,references_asked,references_found\n")
        self._history.write(f"{step.number + 1},{targets},{sum(known)},{step.num_asked},{step.num_found}\n")

    @staticmethod
    def _rows(one: MicrobatchFacts, microbatch: MicrobatchPlan | None, scores: Sequence[float]) -> list[dict[str, Any]]:
        real_BS = one.is_target_BS | one.is_context_BS
        kept_BS = microbatch.kept_mask() & real_BS if microbatch else real_BS
        values, rows = iter(scores), []  # scores are in the order of samples and positions
        for sample, row in enumerate(one.row_N.tolist()):
            own_S = torch.tensor(True) if one.sample_BS is None else one.sample_BS[row] == sample
            target_S, kept_S, visual_S = (of_BS[row] & own_S for of_BS in (one.is_target_BS, kept_BS, one.is_visual_BS))
            start = int(one.start_N[sample]) if one.joins_rows else 0
            positions = (torch.where(target_S)[0] - start).tolist()
            rows.append(
                {
                    "sample_key": key_hex(one.difficulty_key_N2[sample]),
                    "num_context": int((one.is_context_BS[row] & own_S).sum()),
                    "num_targets": len(positions),
                    "num_kept_targets": int((kept_S & target_S).sum()),
                    "num_visual": int(visual_S.sum()),
                    "num_kept_visual": int((kept_S & visual_S).sum()),
                    "kept": (torch.where(kept_S)[0] - start).tolist(),
                    "scores": {
                        str(position): value if math.isfinite(value) else None  # JSON knows no NaN
                        for position, value in zip(positions, values, strict=False)
                    },
                }
            )
        return rows

    def close(self) -> None:
        """Close the file."""
        for file in (self._file, self._history):
            if file is not None:
                file.close()
