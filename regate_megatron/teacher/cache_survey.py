"""Go through whole caches: verify, count, merge. One process, no GPU; nothing here runs while training.

float16 has 65,536 values, so one count per value gives exact quantiles and histograms of a cache of any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regate_megatron.errors import refuse
from regate_megatron.teacher.cache import LOSS_FOLDER, TOKEN_FOLDER, ReferenceCache
from regate_megatron.teacher.cache_files import SUFFIX, DamagedFile, LossFile, read_table, write_losses
from regate_megatron.teacher.manifest import check, claim, claim_probe, read_manifest, read_probe
from regate_megatron.teacher.token_statistics import TokenStatistics

_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
RECORDS_PER_FILE = 1 << 18

Progress = Callable[[int], Any]


@dataclass
class Survey:
    """What is in a cache; records that two writers wrote count twice.

    Attributes:
        problems: one line per damaged file, with its reason.
        num_files, num_bytes, num_records, num_losses: sums over the sound files.
        count_V: how often each float16 bit pattern occurs, int64 [65536].
    """

    problems: list[str] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0
    num_records: int = 0
    num_losses: int = 0
    count_V: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.int64))

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """The losses below which these shares of all losses lie."""
        order = np.argsort(np.where(np.isfinite(_VALUES), _VALUES, np.inf), kind="stable")
        cumulated = self.count_V[order].cumsum()
        places = np.searchsorted(cumulated, [max(1, share * self.num_losses) for share in shares])
        return _VALUES[order][np.minimum(places, len(order) - 1)].tolist()

    @property
    def mean(self) -> float:
        """Mean loss per target."""
        seen = self.count_V > 0
        return float((self.count_V[seen] * _VALUES[seen]).sum() / max(1, self.num_losses))

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """Losses between consecutive edges."""
        seen = self.count_V > 0
        return np.histogram(_VALUES[seen], edges, weights=self.count_V[seen])[0]


def loss_files(directory: Path) -> list[Path]:
    """The files of losses of a cache.

    Raises:
        ReGateError: it is no cache.
    """
    if read_manifest(directory) is None:
        raise refuse("cache", given=f"{directory}, which has no manifest", allowed="a cache", change="the path")
    return sorted((directory / LOSS_FOLDER).glob(f"[!.]*{SUFFIX}"))


def survey(directory: Path, progress: Progress = lambda count: None) -> Survey:
    """Read a cache from end to end, checking every record.

    Args:
        progress: called with the number of bytes gone through since its last call.
    """
    result = Survey()
    for path in loss_files(directory):
        records, losses, count_V = 0, 0, np.zeros(1 << 16, np.int64)
        try:
            for part in batched(LossFile.open(path).records(), 4096):
                value_X = np.concatenate([loss for _, loss in part])
                count_V += np.bincount(value_X.view(np.uint16), minlength=1 << 16)
                records, losses = records + len(part), losses + len(value_X)
        except (DamagedFile, OSError) as error:
            result.problems.append(f"{path}: {error}")
        else:
            result.num_files += 1
            result.num_bytes += path.stat().st_size
            result.num_records += records
            result.num_losses += losses
            result.count_V += count_V
        progress(path.stat().st_size)
    for path in (directory / TOKEN_FOLDER).glob(f"[!.]*{SUFFIX}"):
        try:
            read_table(path)
        except (DamagedFile, OSError) as error:
            result.problems.append(f"{path}: {error}")
    return result


def token_statistics(directory: Path) -> TokenStatistics:
    """Counts and sums by token id over all files of a cache; damaged files are left out."""
    total = TokenStatistics()
    for path in (directory / TOKEN_FOLDER).glob(f"[!.]*{SUFFIX}"):
        try:
            total.read([path])
        except (DamagedFile, OSError):
            continue
    return total


def merge(sources: Sequence[Path], target: Path, progress: Progress = lambda count: None) -> int:
    """Write every record of ``sources`` once into large files of ``target``; returns how many it added.

    What ``target`` has already is left out, so an interrupted merge is continued by starting it again. Sources stay.

    Raises:
        ReGateError: the caches are of different teachers.
    """
    identity = read_manifest(sources[0])
    for source in sources:
        loss_files(source)
        check(source, identity)
    claim(target, identity)
    for source in sources:
        if (losses := read_probe(source)) is not None:
            claim_probe(target, losses, identity["dtype"])
    cache = ReferenceCache(target, "merged")
    for source in sources:
        _take_over_statistics(source, target)
    added, keys, losses = 0, [], []
    for key, loss in _all_records(sources, progress):
        if cache.look_up([key], [len(loss)]) == [None]:
            keys.append(key)
            losses.append(loss)
        if len(keys) == RECORDS_PER_FILE:
            added += _write(target, keys, losses, cache)
            keys, losses = [], []
    added += _write(target, keys, losses, cache)
    cache.close()
    return added


def _take_over_statistics(source: Path, target: Path) -> None:
    """Once per state of a source: they cannot tell which samples they counted."""
    names = sorted(path.name for path in (source / TOKEN_FOLDER).glob(f"[!.]*{SUFFIX}"))
    stem = f"merged-{xxhash.xxh3_64_hexdigest(' '.join(names).encode())}"
    if not list((target / TOKEN_FOLDER).glob(f"{stem}.*")):
        token_statistics(source).write(target / TOKEN_FOLDER, stem)


def _all_records(sources: Sequence[Path], progress: Progress) -> Iterator[tuple[bytes, np.ndarray]]:
    for source in sources:
        for path in loss_files(source):
            try:
                yield from LossFile.open(path).records()
            except (DamagedFile, OSError) as error:
                print(f"{path}: {error}; what follows in it is left out", flush=True)
            progress(path.stat().st_size)


def _write(target: Path, keys: list[bytes], losses: list[np.ndarray], cache: ReferenceCache) -> int:
    records = dict(zip(keys, losses, strict=True))
    if records:
        stem = f"merged-{os.getpid()}-{len(cache):012d}"
        write_losses(target / LOSS_FOLDER, stem, list(records), list(records.values()))
        cache.refresh()
    return len(records)
