#!/usr/bin/env python3
"""Look into reference-loss caches: verify, summary, plot, tokens, merge. One process, no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from regate_megatron.errors import ReGateError, refuse
from regate_megatron.teacher.cache_survey import Survey, loss_files, merge, survey, token_statistics
from regate_megatron.teacher.manifest import fingerprint, read_manifest

EXAMPLE = """\
examples:
  python tools/reference_cache.py summary DIR
  python tools/reference_cache.py verify DIR                          exit code 1 when a file is damaged
  python tools/reference_cache.py plot DIR --output losses.png
  python tools/reference_cache.py tokens DIR --tokenizer tokenizer.json --number 30
  python tools/reference_cache.py merge DIR1 DIR2 --target NEW        also makes few large files of many small ones"""
_SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(argv)
    try:
        return options.run(options)
    except ReGateError as error:
        print(error, file=sys.stderr)
        return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    for name, run, text in (
        ("verify", _verify, "read everything and check every record"),
        ("summary", _summary, "whose losses, how many, how large, how they are distributed"),
    ):
        command(name, run, text).add_argument("directory", type=Path)
    plot = command("plot", _plot, "a histogram of the losses as PNG")
    plot.add_argument("directory", type=Path)
    plot.add_argument("--output", type=Path, required=True, metavar="PNG")
    tokens = command("tokens", _tokens, "the tokens that are hardest and easiest for the teacher, by mean loss")
    tokens.add_argument("directory", type=Path)
    tokens.add_argument("--number", type=int, default=20, help="how many of each (default: 20)")
    tokens.add_argument("--least-count", type=int, default=10, help="leave out rarer tokens (default: 10)")
    tokens.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, its folder, or a .model file")
    joined = command("merge", _merge, "copy every record once into one cache of large files; sources stay")
    joined.add_argument("sources", type=Path, nargs="+", metavar="DIR")
    joined.add_argument("--target", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def _bar(directories: list[Path]) -> tqdm:
    total = sum(path.stat().st_size for directory in directories for path in loss_files(directory))
    return tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None)


def _survey(directory: Path) -> Survey:
    with _bar([directory]) as bar:
        return survey(directory, bar.update)


def _verify(options: argparse.Namespace) -> int:
    found = _survey(options.directory)
    print("\n".join(found.problems) or "no file is damaged")
    print(f"{found.num_files:,} sound files, {found.num_records:,} records, {found.num_losses:,} losses")
    return int(bool(found.problems))


def _summary(options: argparse.Namespace) -> int:
    found, identity = _survey(options.directory), read_manifest(options.directory)
    print(f"teacher      {fingerprint(identity)}")
    for name, value in identity.items():
        print(f"  {name:<12} {json.dumps(value)}")
    print(f"files        {found.num_files:,} sound, {len(found.problems):,} damaged")
    print(f"records      {found.num_records:,} (samples; two writers' copies count twice)")
    print(f"losses       {found.num_losses:,} (targets)")
    print(f"size         {found.num_bytes:,} bytes, {found.num_bytes / max(1, found.num_losses):.2f} per target")
    if found.num_losses:
        print(f"mean loss    {found.mean:.3f}")
        quantiles = zip(_SHARES, found.quantiles(_SHARES), strict=True)
        print("quantiles    " + "  ".join(f"{share:.0%} {value:.3f}" for share, value in quantiles))
    return 0


def _plot(options: argparse.Namespace) -> int:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = _survey(options.directory)
    (highest,) = found.quantiles([0.999])
    edges = np.linspace(0, max(highest, 0.1), 101)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.stairs(found.histogram(edges) / max(1, found.num_losses), edges, fill=True)
    for share, value in zip((0.5, 0.9), found.quantiles((0.5, 0.9)), strict=True):
        axes.axvline(value, color="black", linewidth=0.8, linestyle="dashed")
        axes.annotate(f" {share:.0%}", (value, axes.get_ylim()[1]), va="top")
    axes.set(xlabel="reference loss of a target (nats)", ylabel="share of targets")
    axes.set_title(f"{found.num_losses:,} targets of {found.num_records:,} samples", fontsize="medium")
    figure.savefig(options.output, dpi=120)
    print(f"wrote {options.output}")
    return 0


def _tokens(options: argparse.Namespace) -> int:
    loss_files(options.directory)  # refuses what is no cache
    ids, counts, sums = token_statistics(options.directory)[0].seen()
    often = counts >= options.least_count
    ids, counts, means = ids[often], counts[often], (sums / np.maximum(counts, 1))[often]
    decode, order = _decoder(options.tokenizer), np.argsort(-means, kind="stable")
    for title, chosen in (("hardest", order), ("easiest", order[::-1])):
        print(f"{title} of {len(ids):,} tokens seen {options.least_count} times or more")
        for index in chosen[: options.number]:
            text = decode(int(ids[index]))
            print(f"  {means[index]:8.3f}  {counts[index]:>12,} times  id {ids[index]:>7}{text}")
    return 0


def _decoder(path: Path | None) -> Callable[[int], str]:
    """Token id -> what to print behind it."""
    if path is None:
        return lambda token: ""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise refuse("--tokenizer", given=file, allowed="tokenizer.json, its folder, or a .model file", change="it")
    if file.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(file))
        return lambda token: f"  {pieces.id_to_piece(token)!r}" if token < pieces.vocab_size() else ""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda token: f"  {(tokenizer.decode([token], skip_special_tokens=False) or tokenizer.id_to_token(token))!r}"


def _merge(options: argparse.Namespace) -> int:
    if options.target.resolve() in [source.resolve() for source in options.sources]:
        raise refuse("--target", given=f"{options.target}, a source", allowed="another directory", change="it")
    with _bar(options.sources) as bar:
        added = merge(options.sources, options.target, bar.update)
    print(f"added {added:,} records to {options.target}; use it with --regate-reference-cache {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
