#!/usr/bin/env python3
"""The teacher's cost on video-like rows: `drop` against `pad`, and with what was scored before.

    python -m benchmarks.teacher             # about a minute; out/bench/teacher.json
    python -m benchmarks.teacher --quick

Rows are three quarters visual, one sixteenth prompt, the rest answer. The teacher is the student's own language model.
Every round takes a new batch: the student's dense step, the teacher with `pad` (the paper: every visual position holds
a placeholder) and with `drop` (they are left out), both from nothing, as in the first epoch; then the same batch again,
as in later epochs, from memory and from a cache on disk.

* **÷ pad**: the teacher's CPU time on the same rows.
* **of a dense step**: the look-up and the teacher ÷ the student's step, forward and backward.
* **of an epoch**: the same against an epoch of the default schedule, F/C of its steps dense (16 of 128) and the others
  sparse with keep ratio 0.5.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.measuring import cpu_seconds, figure, rounds_within, run_part, spread
from benchmarks.models import Size

DENSE_SHARE = 16 / 128
WAYS = ("pad", "drop", "drop, from memory", "drop, from disk")


class _Teacher:
    """A frozen teacher and its stores; ``ask`` is what a step does for its reference losses."""

    def __init__(self, size: Size, visual: str, weights: Any) -> None:
        from regate_megatron.ranks.topology import Topology
        from regate_megatron.teacher import ReferenceLosses

        text_only = models.language_model(replace(size, image=0))
        text_only.load_state_dict(weights)
        text_only.requires_grad_(False).eval()
        alone = Topology(0, 1, True, 0, 1, None, None, None)
        self.losses = ReferenceLosses(text_only.config, [text_only], alone, visual=visual, pad_token=0)

    def ask(self, facts: list[Any], micro_batch_size: int) -> None:
        """Look up, and compute what is missing."""
        misses = self.losses.look_up(facts)
        self.losses.fetch(micro_batch_size, anyone_misses=misses)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of new batches."""
    models.start()
    from benchmarks.stepping import ReGATERunner, Runner
    from regate_megatron.batches import adapter_for
    from regate_megatron.memory.references import ReferenceCache

    size = Size(rows=1, length=1024, image=768, prompt=64)
    if options.quick:
        size = Size(rows=1, length=64, image=48, prompt=4, hidden=32, layers=3, vocab=64, vision_layers=1)
    student = Runner(size)
    sparse = ReGATERunner(size, {"keep_ratio": 0.5, "dense_layers": 1}, like=student.model)
    sparse.step(models.make_batch(size, seed=0))
    weights = student.model.language_model.state_dict()
    teachers = {visual: _Teacher(size, visual, weights) for visual in ("pad", "drop")}
    adapter = adapter_for(student.model, 0, None)
    times: dict[str, list[float]] = {name: [] for name in ("student", "sparse", *WAYS)}
    with tempfile.TemporaryDirectory() as folder:
        seconds = options.seconds or (2 if options.quick else 75)
        for index in rounds_within(3 if options.quick else 30, seconds, name="teacher"):
            batch = models.make_batch(size, seed=1000 + index)
            facts = [adapter.read(batch)]

            def ask(visual: str, facts: list[Any] = facts) -> float:
                return cpu_seconds(lambda: teachers[visual].ask(facts, size.rows))

            spent = {"student": student.step(batch).total.cpu, "sparse": sparse.step(batch).total.cpu}
            spent |= {"pad": ask("pad"), "drop": ask("drop"), "drop, from memory": ask("drop")}
            in_memory = teachers["drop"].losses.store
            teachers["drop"].losses.store = on_disk = ReferenceCache(folder, f"writer-{index}")
            ask("drop")
            on_disk.flush()
            on_disk.close()
            teachers["drop"].losses.store = reader = ReferenceCache(folder, "reader")
            spent["drop, from disk"] = ask("drop")
            assert teachers["drop"].losses._request is None, "the cache on disk holds what was written"
            reader.close()
            teachers["drop"].losses.store = in_memory
            if index:
                for name, value in spent.items():
                    times[name].append(value)
    return _report(times, size)


def _report(times: dict[str, list[float]], size: Size) -> dict[str, Any]:
    rows = []
    for way in WAYS:
        pairs = list(zip(times[way], times["student"], times["sparse"], times["pad"], strict=True))
        rows.append(
            {
                "way": way,
                "over_pad": spread([own / pad for own, _, _, pad in pairs]),
                "of_dense_step": spread([own / dense for own, dense, _, _ in pairs]),
                "of_epoch": spread(
                    [own / (DENSE_SHARE * dense + (1 - DENSE_SHARE) * sparse) for own, dense, sparse, _ in pairs]
                ),
                "ms": spread([1000 * own for own, *_ in pairs]),
            }
        )
    setting = f"video, {size.image / size.length:.0%} of {size.length} positions visual"
    figures = []
    for row in rows:
        beside = (
            f"{row['over_pad']['median']:.1%} of pad; {row['of_dense_step']['median']:.2%} of a dense step;"
            f" {row['ms']['median']:.2f} ms per row"
        )
        figures.append(figure(f"{setting}: {row['way']}", "of an epoch", row["of_epoch"], "percent", beside=beside))
    return {"figures": figures, "rows": rows, "setting": vars(size)}


if __name__ == "__main__":
    run_part("teacher", __doc__, measure)
