"""Go through whole caches: verify, count, merge. One process, no GPU; nothing here runs while training.

float16 has 65,536 values, so one count per value gives exact quantiles and histograms of a cache of any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regate_megatron.errors import refuse
from regate_megatron.memory.files import RECORDS, TABLE, DamagedFile, RecordFile
from regate_megatron.memory.references import LOSS_FOLDER, TOKEN_FOLDER, ReferenceCache, write_losses
from regate_megatron.memory.token_statistics import TokenStatistics
from regate_megatron.teacher.manifest import check, claim, claim_probe, read_manifest, read_probe

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
        allowed = "a folder that --regate-reference-cache has filled"
        raise refuse("cache", given=f"{directory}, which has no manifest", allowed=allowed, change="the path")
    return sorted((directory / LOSS_FOLDER).glob(f"[!.]*{RECORDS}"))


def survey(directory: Path, progress: Progress = lambda count: None) -> Survey:
    """Read a cache from end to end, checking every record.

    Args:
        progress: called with the number of bytes gone through since its last call.
    """
    result = Survey()
    for path in loss_files(directory):
        count_V = np.zeros(1 << 16, np.int64)
        try:
            file, entry_N = RecordFile.open(path)
            for piece in file.pieces(entry_N):
                count_V += np.bincount(piece.value_X.view(np.uint16), minlength=1 << 16)
        except (DamagedFile, OSError) as error:
            result.problems.append(f"{path}: {error}")
        else:
            result.num_files += 1
            result.num_bytes += path.stat().st_size
            result.num_records += file.facts.num_records
            result.num_losses += file.facts.num_values
            result.count_V += count_V
        progress(path.stat().st_size)
    result.problems += token_statistics(directory)[1]
    return result


def token_statistics(directory: Path) -> tuple[TokenStatistics, list[str]]:
    """Counts and sums by token id over all sound files of a cache, and one line per damaged file."""
    total, problems = TokenStatistics(), []
    for path in _token_files(directory):
        try:
            total.read(path)
        except (DamagedFile, OSError) as error:
            problems.append(f"{path}: {error}")
    return total, problems


def _token_files(directory: Path) -> list[Path]:
    return sorted((directory / TOKEN_FOLDER).glob(f"[!.]*{TABLE}"))


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
    added, fresh = 0, {}
    for key, loss in _all_records(sources, progress):
        if cache.look_up([key], [len(loss)]) == [None]:
            fresh[key] = loss
        if len(fresh) == RECORDS_PER_FILE:
            added += _write(target, fresh, cache)
            fresh = {}
    added += _write(target, fresh, cache)
    cache.close()
    return added


def _take_over_statistics(source: Path, target: Path) -> None:
    """Once per state of a source: they cannot tell which samples they counted."""
    names = " ".join(path.name for path in _token_files(source))
    path = target / TOKEN_FOLDER / f"merged-{xxhash.xxh3_64_hexdigest(names.encode())}{TABLE}"
    if not path.exists():
        token_statistics(source)[0].write(path)


def _all_records(sources: Sequence[Path], progress: Progress) -> Iterator[tuple[bytes, np.ndarray]]:
    for source in sources:
        for path in loss_files(source):
            try:
                file, entry_N = RecordFile.open(path)
                for piece in file.pieces(entry_N):
                    losses = np.split(piece.value_X, piece.count_N.cumsum()[:-1])
                    yield from zip([key_2.tobytes() for key_2 in piece.key_N2], losses, strict=True)
            except (DamagedFile, OSError) as error:
                print(f"{path}: {error}; what follows in it is left out", flush=True)
            progress(path.stat().st_size)


def _write(target: Path, records: dict[bytes, np.ndarray], cache: ReferenceCache) -> int:
    if records:
        write_losses(target / LOSS_FOLDER / f"merged-{os.getpid()}-{len(cache):012d}{RECORDS}", records)
        cache.refresh()
    return len(records)
