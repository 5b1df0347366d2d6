"""Say before a run whether elision is worth it on one's data.

    python -m regate_megatron estimate torchrun --nnodes 4 --nproc-per-node 8 -m regate_megatron SCRIPT <its flags>
    python -m regate_megatron estimate --trace DIR --ranks 64 <model> <ReGATE's flags>
    python -m regate_megatron estimate --length 4096 --targets 300 --visual 2880 --ranks 64 <model> <ReGATE's flags>

With a launch line the script's own batches are read, in a dry run whose rows are as long as the line says; the model
and the ranks are the line's. (Where its data are not on this machine, mock data take their place, and the summary says
so.) Otherwise rows come from a trace (``--regate-trace`` of any run of the script on the data, with or without sparse
steps: one of a few iterations is enough), or are all alike, in positions of the merged row: ``--length`` of them (what
the batch is padded to), ``--real`` that are no padding (default: all), ``--targets`` with a loss, ``--visual`` of
images or video, of ``--images`` (1).

``--ranks`` data-parallel replicas run ``--rows`` rows each in a step (8). The model: ``--layers``, ``--hidden``,
``--ffn``, ``--vocabulary`` (32, 4096, 11008, 32000); ``--kv`` is the width of keys (default: hidden).

*Times as fast* takes the teacher's losses as known (a cache, or samples that come again), *if all new* none of them.
Rows are drawn for 20 steps, and every budget runs the lengths that the planner would give them. What is said is the
decoder's work, the teacher's included: a vision tower, the optimizer and communication come on top and make gains
smaller.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regate_megatron.config import BUDGETS, ReGateConfig, flag
from regate_megatron.cpu.dry_run import command as dry_run
from regate_megatron.cpu.dry_run.shrink import dense_group
from regate_megatron.errors import given_to_argparse, nearest, one_line_refusals, refuse
from regate_megatron.flags import add_arguments, parse
from regate_megatron.method import balance, budget
from regate_megatron.method.budget import Alignment
from regate_megatron.method.candidates import Candidates, Sort
from regate_megatron.method.deal import deal
from regate_megatron.method.worth import Decoder, Outlook, Rows, outlook
from regate_megatron.step.outlook import advice, shares

_STEPS = 20


def main(words: Sequence[str]) -> None:
    """Run the command; exits with 1 and one line where it cannot."""
    at = next((number for number, word in enumerate(words) if _begins_line(word)), None)
    if at is not None:
        dry_run.main(_with_trace([str(word) for word in words], at), sample=_of_line)
        return
    with one_line_refusals():
        config, options = parse(["--regate", *(word for word in words if word != "--regate")]), _options(words)
        _require_what_can_go(options, config)
        say(_rows(options), config, options)


def _require_what_can_go(options: argparse.Namespace, config: ReGateConfig) -> None:
    """Refuse numbers that leave nothing to leave out, which most likely were forgotten.

    Raises:
        ReGateError: the row has neither targets nor visual positions that the settings rank.
    """
    asked = {"targets": config.ranks_targets, "visual": config.ranks_visual}
    names = [f"--{name}" for name, ranks in asked.items() if ranks]
    if options.trace is None and names and not any(asked[name] and getattr(options, name) for name in asked):
        ratios = f"{flag('keep_ratio')} {config.keep_ratio:g}, {flag('visual_keep_ratio')} {config.visual_keep_ratio:g}"
        raise refuse(
            "estimate",
            given=f"a row without {' and '.join(names)}, of which nothing can go ({ratios})",
            allowed="positions of the row that can go",
            change=f"the command: add {' or '.join(names)}",
        )


def say(rows_R4: np.ndarray, config: ReGateConfig, options: argparse.Namespace) -> None:
    """Print what to expect of rows, as :func:`_rows` gives them."""
    total = rows_R4.sum(axis=0)
    length, real, targets, visual = (total / len(rows_R4)).tolist()
    ratio, visual_ratio = config.keep_ratio, config.visual_keep_ratio
    gone = (1 - ratio) * targets + (1 - visual_ratio) * visual
    print(
        f"[estimate] {len(rows_R4):,} rows of {length:,.0f} positions (mean): {targets / length:.1%} answer tokens,"
        f" {visual / length:.1%} visual, {1 - real / length:.1%} padding; {gone / length:.1%} could go with keep"
        f" ratio {ratio:g} and {visual_ratio:g} of the visual"
    )
    found = {kind: estimate(rows_R4, config, options, kind) for kind in BUDGETS}
    setting = f"{options.ranks} ranks of {options.rows} rows"
    print(f"[estimate] {setting:<24} sparse step   cycle   times as fast   if all new")
    for kind, one in found.items():
        times = f"{one.speedup:>15.2f} {one.speedup_if_new:>12.2f}"
        print(f"[estimate] {kind:<24} {one.step:>11.1%} {one.cycle:>7.1%} {times}")
    chosen = found[config.budget]
    said = advice(chosen, targets / length, visual / length, config)
    print(f"[estimate] with {flag('budget')} {config.budget}: {chosen.words()}{said}")


def _begins_line(word: str) -> bool:
    name = Path(word).name
    return name == "torchrun" or name.endswith(".py") or re.fullmatch(r"python[\d.]*", name) is not None


def _with_trace(words: list[str], at: int) -> list[str]:
    """A launch line that is on and writes a trace."""
    given = {word.partition("=")[0] for word in words[at:]}
    on = [] if "--regate" in given else ["--regate", "--regate-teacher-load", "student"]
    return [*words, *on, *([] if "--regate-trace" in given else ["--regate-trace", "trace"])]


def _of_line(trace: Path, cluster: Any, config: ReGateConfig) -> None:
    """What to expect of a launch line whose rows were traced."""
    ranks = cluster.world_size // dense_group(cluster)
    groups = cluster.num_query_groups if cluster.group_query_attention else cluster.num_attention_heads
    ffn = cluster.ffn_hidden_size
    if getattr(cluster, "num_experts", None):
        shared = cluster.moe_shared_expert_intermediate_size or 0
        ffn = cluster.moe_router_topk * (cluster.moe_ffn_hidden_size or ffn) + shared
    words = {
        "ranks": ranks,
        "rows": max(cluster.global_batch_size // ranks, 1),
        "layers": cluster.num_layers,
        "hidden": cluster.hidden_size,
        "ffn": ffn,
        "kv": groups * cluster.kv_channels,
        "vocabulary": getattr(cluster, "padded_vocab_size", None) or getattr(cluster, "vocab_size", None) or 32000,
    }
    options = _options([f"--trace={trace}", *(f"--{name}={value}" for name, value in words.items())])
    say(_rows(options), config, options)


def estimate(rows_R4: np.ndarray, config: ReGateConfig, options: argparse.Namespace, kind: str) -> Outlook:
    """What to expect of rows, drawn by chance for each step; rows as :func:`_rows` gives them."""
    generator = np.random.default_rng(config.seed)
    num_rows = options.ranks * options.rows
    dense, short, text, slowest, slowest_dense = Rows(0, 0), Rows(0, 0), Rows(0, 0), 0, 0
    for _ in range(_STEPS):
        drawn_N4 = rows_R4[generator.integers(len(rows_R4), size=num_rows)]
        length_N, run_N = drawn_N4[:, 0], lengths(drawn_N4, config, options, kind)
        dense, short = _plus(dense, length_N), _plus(short, run_N)
        text = _plus(text, length_N - drawn_N4[:, 3] * (config.teacher_visual == "drop"))
        slowest += int(run_N.reshape(options.ranks, -1).sum(axis=1).max())
        slowest_dense += int(length_N.reshape(options.ranks, -1).sum(axis=1).max())
    return outlook(
        _decoder(options, config),
        dense=dense,
        short=short,
        text=text if config.needs_teacher else None,
        imbalance=(slowest / short.positions) / (slowest_dense / dense.positions),
        **shares(config),
    )


def lengths(rows_N4: np.ndarray, config: ReGateConfig, options: argparse.Namespace, kind: str) -> np.ndarray:
    """The positions that each row of a global batch runs; int64 [N], the rows of one rank after those of another."""
    length_N, real_N, targets_N, visual_N = (torch.from_numpy(column) for column in rows_N4.T.copy())
    number_N = torch.arange(len(rows_N4))
    candidates = Candidates(
        always_R=real_N - targets_N - (visual_N if config.visual_keep_ratio < 1.0 else 0),
        dense_M=length_N,
        key_M=number_N,
        sorts=(
            Sort(count_G=targets_N, row_G=number_N, keep_ratio=config.keep_ratio),
            *_visual(visual_N, number_N, options.images, config),
        ),
    )
    alignment = Alignment(1, config.length_multiple)
    if kind == "uniform":
        return budget.uniform_lengths(candidates, alignment, lambda values: values[None])[0].numpy()
    length_M = budget.per_sample_lengths(candidates, alignment)[0].numpy()
    if kind == "dealt":
        at_home_DR = length_M.reshape(options.ranks, -1)
        return length_M[deal(at_home_DR, number_N.numpy().reshape(at_home_DR.shape)).from_DM.ravel()]
    if kind == "per-sample":
        return length_M
    span = balance.span_of(candidates, alignment)
    low_D, high_D, asked_D = (
        values.view(options.ranks, -1).sum(dim=1) for values in (span.low_M, span.high_M, candidates.ask_R)
    )
    total, _ = balance.common_total(-(-int(asked_D.sum()) // options.ranks), low_D, high_D, int(span.step_M.max()))
    # spread over a rank's rows as room allows: which of them grow is a matter of scores
    share_D = (torch.clamp(torch.tensor(total), low_D, high_D) - low_D) / (high_D - low_D).clamp_min(1)
    return (span.low_M + share_D.repeat_interleave(options.rows) * (span.high_M - span.low_M)).round().long().numpy()


def _visual(visual_N: torch.Tensor, number_N: torch.Tensor, images: int, config: ReGateConfig) -> tuple[Sort, ...]:
    if config.visual_keep_ratio == 1.0:
        return ()
    count_NI = visual_N[:, None] // images + (torch.arange(images) < (visual_N % images)[:, None])
    ratio, row_G = config.visual_keep_ratio, number_N.repeat_interleave(images)
    return (Sort(count_G=count_NI.reshape(-1), row_G=row_G, keep_ratio=ratio),)


def _plus(rows: Rows, length_N: np.ndarray) -> Rows:
    return Rows(rows.positions + float(length_N.sum()), rows.squares + float((length_N.astype(float) ** 2).sum()))


def _decoder(options: argparse.Namespace, config: ReGateConfig) -> Decoder:
    return Decoder(
        layers=options.layers,
        dense_layers=config.dense_layers + config.dense_last_layers,
        hidden=options.hidden,
        ffn=options.ffn,
        kv=options.kv or options.hidden,
        vocabulary=options.vocabulary,
    )


def _options(words: Sequence[str]) -> argparse.Namespace:
    """Our own options, beside those of ReGATE, which are made settings elsewhere.

    Raises:
        ReGateError: one is missing, unknown or out of range.
    """
    parser = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False))
    parser.add_argument("--trace", type=Path)
    for name, default in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    try:
        options, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        what, given = f"estimate: {error.argument_name}", given_to_argparse(error)
        raise refuse(what, given=given, allowed="a value as --help describes it", change="it") from None
    own = sorted(f"--{name}" for name in ("trace", *_NUMBERS))
    if rest:
        change = nearest(rest[0].partition("=")[0], own, "the command")
        raise refuse("estimate", given=rest[0], allowed=f"{', '.join(own)}, and ReGATE's", change=change)
    if (options.trace is None) == (options.length is None):
        given = "no rows" if options.trace is None else "--length beside --trace, which has the rows"
        raise refuse("estimate", given=given, allowed="--trace DIR, or --length and --targets", change="the command")
    for name in _NUMBERS:
        value, least = getattr(options, name), int(name not in ("targets", "visual"))
        if value is not None and value < least:
            raise refuse(f"estimate: --{name}", given=value, allowed=f"an integer of {least} or more", change="it")
    return options


_NUMBERS = {
    "length": None,
    "real": None,
    "targets": 0,
    "visual": 0,
    "images": 1,
    "ranks": 8,
    "rows": 8,
    "layers": 32,
    "hidden": 4096,
    "ffn": 11008,
    "kv": None,
    "vocabulary": 32000,
}


def _rows(options: argparse.Namespace) -> np.ndarray:
    """Length, real positions, targets and visual positions of each row; int64 [R, 4].

    Raises:
        ReGateError: there are none, or more in a row than it is long.
    """
    if options.trace is None:
        real = options.real or options.length
        found = [(options.length, real, options.targets, options.visual)]
        if not options.targets + options.visual <= real <= options.length:
            raise refuse(
                "estimate",
                given=f"{options.targets} targets and {options.visual} visual positions in {real} of {options.length}",
                allowed="no more than the row has",
                change="the numbers",
            )
        return np.array(found)
    found = [row for path in sorted(options.trace.glob("dp*.jsonl")) for row in _traced(path)]
    if not found:
        change = "it to a folder that --regate-trace of a run has filled"
        raise refuse("estimate: --trace", given=f"{options.trace} without rows", allowed="a trace", change=change)
    return np.array(found)


def _traced(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """The rows of one file; a last line that breaks off is left: a run writes it still, or was killed.

    Raises:
        ReGateError: it cannot be read, or holds something else.
    """
    try:
        for line in path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                if line.endswith("\n"):
                    raise
                return
            for row in record["rows"]:
                targets = int(row["num_targets"])
                yield record["dense_length"], row["num_context"] + targets, targets, int(row["num_visual"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = {"allowed": "what --regate-trace writes", "change": "it to another folder, or take that file away"}
        raise refuse("estimate: --trace", given=f"{path}, unreadable ({type(error).__name__})", **form) from None
