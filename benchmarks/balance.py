#!/usr/bin/env python3
"""Positions run over simulated data-parallel ranks under each budget, on skewed mixes of rows; `make bench-balance`.

    python benchmarks/balance.py            # minutes; table, out/bench/balance.json and balance.png
    python benchmarks/balance.py --quick    # few ranks, seconds

Every simulated rank runs the planner's own code (:func:`regate_megatron.method.selection.select`) on its rows; only the
exchange between ranks is simulated. Per mix, number of ranks and budget:

* **max/mean**: positions run by the slowest rank of a step over the mean rank, alignment and fill included; over steps
  the sums of both are compared, since every step waits for its slowest rank.
* **achievable**: the least max/mean there is: of `balanced` what contexts and row lengths allow, where rows are dealt
  what no deal falls below (:func:`regate_megatron.method.deal.at_best`).
* **kept**: candidates that run ÷ candidates: targets, and with ``--visual-keep-ratio`` visual positions, too.
  **positions**: positions run ÷ positions of the dense step. **slowest**: the slowest rank's positions ÷ its
  positions in the dense step's slowest rank: what the step time follows.
* **each**: as max/mean, but ranks wait for the slowest in every microbatch, as those that share experts do; **at
  best**: what no deal falls below there.
* **fill**: slots that hold neither context nor a kept candidate ÷ positions run.
* **lengths**: distinct lengths that occurred.
* **moved**: microbatches that leave their rank ÷ microbatches; in the file beside it the time one planner takes to deal
  (`deal_ms`, CPU) and what it sends and receives to know all lengths (`table_bytes`).

`dense` runs every position, `dense-dealt` runs them where their lengths even out (`--regate-deal-dense`). With several
rows per microbatch `dealt-rows` is there too: what single rows would gain over whole microbatches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.skew import MIXES, Mix, draw_row, make_rows  # noqa: E402
from regate_megatron.method.budget import Alignment, per_sample_lengths  # noqa: E402
from regate_megatron.method.candidates import Candidates  # noqa: E402
from regate_megatron.method.deal import at_best, deal  # noqa: E402
from regate_megatron.method.selection import Selection, select  # noqa: E402

BUDGETS = ("per-sample", "uniform", "balanced", "dealt")
COLUMNS = ("max/mean", "achievable", "each", "at best", "kept", "positions", "slowest", "fill", "lengths", "moved")


@dataclass
class Tally:
    """Sums over the steps of one setting."""

    slowest: int = 0
    each: int = 0
    each_at_best: int = 0
    mean: float = 0.0
    achievable: float = 0.0  # of the slowest, had each step the least max/mean
    targets: int = 0
    kept: int = 0
    context: int = 0
    run: int = 0
    dense: int = 0
    dense_slowest: int = 0
    lengths: set[int] = field(default_factory=set)
    moved: int = 0
    micro: int = 0
    deal_s: list[float] = field(default_factory=list)
    table_bytes: int = 0

    def report(self) -> dict[str, float]:
        """The columns of the table."""
        found = {
            "max/mean": self.slowest / self.mean,
            "achievable": self.achievable / self.mean,
            "kept": self.kept / self.targets,
            "positions": self.run / self.dense,
            "slowest": self.slowest / self.dense_slowest,
            "fill": 1 - (self.context + self.kept) / self.run,
            "lengths": len(self.lengths),
            "moved": self.moved / self.micro,
            "each": self.each / self.mean,
            "at best": self.each_at_best / self.mean,
        }
        if self.deal_s:
            found |= {"deal_ms": 1e3 * statistics.median(self.deal_s), "table_bytes": self.table_bytes}
        return found


class _Asked(Exception):
    """A rank has reached the exchange."""


def over_ranks(ranks: list[Candidates], **options: Any) -> list[Selection]:
    """:func:`select` on every rank: once up to the exchange, then whole, with what all ranks gave."""
    given: list[torch.Tensor] = []

    def ask(values: torch.Tensor) -> torch.Tensor:
        given.append(values)
        raise _Asked

    def attempt(rows: Candidates) -> Selection | None:
        try:
            return select(rows, all_gather=ask, **options)
        except _Asked:
            return None

    done = [attempt(rows) for rows in ranks]
    if not given:
        return done
    table = torch.stack(given)
    return [select(rows, all_gather=lambda values: table, **options) for rows in ranks]


def count(tally: Tally, ranks: list[Candidates], length_DM: torch.Tensor, kept: int, achievable: float) -> None:
    """Add one step: the lengths of each rank's microbatches, and the candidates that run."""
    rows = ranks[0].rows
    run_D = (length_DM.sum(dim=1) * rows).tolist()
    dense_D = [int(own.dense_M.sum()) * rows for own in ranks]
    tally.slowest += max(run_D)
    tally.each += int(length_DM.amax(dim=0).sum()) * rows
    tally.mean += sum(run_D) / len(run_D)
    tally.achievable += achievable * sum(run_D) / len(run_D)
    tally.targets += sum(len(own.score_X) for own in ranks)
    tally.kept += kept
    tally.context += sum(int(own.always_R.sum()) for own in ranks)
    tally.run += sum(run_D)
    tally.dense += sum(dense_D)
    tally.dense_slowest += max(dense_D)
    tally.lengths |= set(length_DM.unique().tolist())
    tally.micro += length_DM.numel()


def measure(mix: Mix, num_ranks: int, steps: int, options: argparse.Namespace, extra: int | None) -> dict[str, Any]:
    """All budgets on the same rows."""
    rng = np.random.default_rng(options.seed)
    names = ("dense", "dense-dealt", *BUDGETS, "dealt, shared experts", "dealt-rows")
    tallies = {name: Tally() for name in names}
    choice = {"alignment": Alignment(options.layout_multiple, extra)}
    for _ in range(steps):
        drawn = [[draw_row(mix, rng) for _ in range(options.rows)] for _ in range(num_ranks)]
        ratios = (options.keep_ratio, options.micro_batch_size, options.visual_keep_ratio)
        ranks = [make_rows(mix, rows, rng, *ratios) for rows in drawn]
        dense_DM = torch.stack([rows.dense_M for rows in ranks])
        key_DM, everything = torch.stack([rows.key_M for rows in ranks]), sum(len(rows.score_X) for rows in ranks)
        count(tallies["dense"], ranks, dense_DM, everything, 0)
        if len(dense_DM.unique()) > 1:
            _count_dealt(tallies["dense-dealt"], ranks, dense_DM, key_DM, everything)
        for kind in BUDGETS[:-1]:
            chosen = over_ranks(ranks, kind=kind, **choice)
            length_DM = torch.stack([one.length_M for one in chosen])
            kept = sum(int(one.is_kept_X.sum()) for one in chosen)
            count(tallies[kind], ranks, length_DM, kept, chosen[0].achievable or 0)
            if kind == "per-sample":  # the very lengths, elsewhere
                _count_dealt(tallies["dealt"], ranks, length_DM, key_DM, kept)
                _count_dealt(tallies["dealt, shared experts"], ranks, length_DM, key_DM, kept, in_columns=True)
                if options.micro_batch_size > 1:
                    _count_dealt_rows(tallies["dealt-rows"], ranks, choice["alignment"], kept)
    return {name: tally.report() for name, tally in tallies.items() if tally.run}


def _count_dealt(
    tally: Tally,
    ranks: list[Candidates],
    length_DM: torch.Tensor,
    key_DM: torch.Tensor,
    kept: int,
    in_columns: bool = False,
) -> None:
    """Add one step of these microbatches, dealt."""
    start = time.process_time()
    dealt = deal(length_DM.numpy(), key_DM.numpy(), in_columns=in_columns)
    tally.deal_s.append(time.process_time() - start)
    tally.moved += dealt.num_moved
    tally.table_bytes = length_DM.nbytes + key_DM.nbytes
    least, least_each = at_best(length_DM.numpy())
    mean = float(length_DM.sum()) / len(ranks)
    count(tally, ranks, length_DM.flatten()[torch.from_numpy(dealt.from_DM)], kept, least / mean)
    tally.each_at_best += least_each * ranks[0].rows


def _count_dealt_rows(tally: Tally, ranks: list[Candidates], alignment: Alignment, kept: int) -> None:
    """As :func:`_count_dealt`, were single rows dealt, alike ones to one microbatch; how many move is not counted."""
    rows = ranks[0].rows
    alone = [
        replace(own, dense_M=own.dense_M.repeat_interleave(rows), key_M=torch.arange(len(own.always_R)))
        for own in ranks
    ]
    length_DR = torch.stack([per_sample_lengths(own, alignment)[0] for own in alone]).numpy()
    length_DM = -np.sort(-length_DR, axis=None)[::rows].reshape(len(ranks), -1)  # the longest of alike ones
    dealt = deal(length_DM, np.arange(length_DM.size).reshape(length_DM.shape), in_columns=False)
    count(tally, ranks, torch.from_numpy(length_DM.ravel()[dealt.from_DM]), kept, 0)


def table(results: dict[str, Any]) -> str:
    """The results for a person."""
    lines = ["| mix | ranks | budget | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name, by_ranks in results.items():
        for num_ranks, by_budget in by_ranks.items():
            for budget, found in by_budget.items():
                cells = [_cell(column, found[column]) for column in COLUMNS]
                lines.append(f"| {name} | {num_ranks} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, value: float) -> str:
    if column == "lengths":
        return str(value)
    if column in ("achievable", "at best", "moved") and not value:
        return ""
    return f"{value:.3f}" if column in ("max/mean", "achievable", "each", "at best") else f"{value:.1%}"


def plot(results: dict[str, Any], path: Path) -> None:
    """max/mean of every budget against the number of ranks, one picture per mix."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3), sharey=True, squeeze=False)
    for axis, (name, by_ranks) in zip(axes[0], results.items(), strict=True):
        for budget in next(iter(by_ranks.values())):
            axis.plot(list(by_ranks), [found[budget]["max/mean"] for found in by_ranks.values()], "o-", label=budget)
        axis.plot(list(by_ranks), [found["balanced"]["achievable"] for found in by_ranks.values()], "k:", label="bound")
        axis.set(title=name, xscale="log", xlabel="data-parallel ranks", xticks=list(by_ranks))
        axis.set_xticklabels(list(by_ranks))
        axis.minorticks_off()
    axes[0][0].set_ylabel("positions run, max/mean")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all settings; returns the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--rows", type=int, default=8, help="rows per rank and step")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--visual-keep-ratio", type=float, default=1.0, help="of every image; 1: they all run")
    parser.add_argument("--layout-multiple", type=int, default=16, help="what the layout needs: TP 8 with CP 8, say")
    parser.add_argument("--length-multiple", type=int, default=None, help="as --regate-length-multiple")
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--rank-steps", type=int, default=1024, help="steps times ranks of each setting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 ranks and 4 steps")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench" / "balance.json")
    options = parser.parse_args(argv)
    if options.quick:
        options.ranks, options.rank_steps = [8], 32
    results: dict[str, Any] = {}
    for name in options.mixes:
        results[name] = {}
        for num_ranks in options.ranks:
            steps = max(1, options.rank_steps // num_ranks)
            results[name][num_ranks] = measure(MIXES[name], num_ranks, steps, options, options.length_multiple)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    mixes = {name: asdict(MIXES[name]) for name in options.mixes}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"settings": settings, "mixes": mixes, "results": results}, indent=1) + "\n")
    report(table(results))
    plot(results, options.out.with_suffix(".png"))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
