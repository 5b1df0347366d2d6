"""Whose losses a cache holds: ``manifest.json`` names the teacher, and a run with another one is refused.

The first run writes it; every later one compares. What it lists is what a reference loss depends on beside the sample:
the weights, every setting that is not known to change no loss, the vocabulary, how visual positions are read, and the
precision of the forward. ``probe.json`` holds the losses of one fixed row, computed again whenever a teacher is built:
what no list names is found by them.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from regate_megatron.config import flag
from regate_megatron.errors import refuse
from regate_megatron.memory.files import DamagedFile
from regate_megatron.memory.manifests import FORMAT, OtherFormat, write_manifest
from regate_megatron.memory.manifests import read_manifest as read_content
from regate_megatron.teacher.values import same

MANIFEST = "manifest.json"
PROBE = "probe.json"
_TOKENIZER = "tokenizer"
# Of the mean loss, how far the losses of the fixed row may be off on average. Layouts differ by less than 1e-5 in
# float32. bfloat16 is 0.04 to 0.2 % off float32 (8 layers of 512, random weights); there a rotary base of 5e5 for 1e4
# is 0.4 to 7 % off, an epsilon of 1e-2 for 1e-5 3 to 6 %.
_TOLERANCE = {"float32": 1e-3}
_TOLERANCE_16_BITS = 0.01


def teacher_identity(
    settings: dict[str, Any],
    *,
    weights: str,
    vocab_size: int,
    tokenizer: str | None,
    visual: str,
    pad_token: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that a reference loss depends on beside the sample, as plain values; the same on every rank and layout.

    Args:
        settings: see :func:`.settings.settings_of`.
        weights: see :mod:`.fingerprint`.
        vocab_size: rows of the teacher's output layer, padding included (padding takes part in the softmax).
        tokenizer: a hash of the tokenizer, None where none could be made.
        dtype: the weights', in which the forward runs.
    """
    return {
        "weights": weights,
        "architecture": settings,
        "vocab_size": vocab_size,
        _TOKENIZER: tokenizer,
        "visual": visual if visual == "drop" else f"pad with {pad_token}",
        "dtype": str(dtype).removeprefix("torch."),
    }


def fingerprint(identity: dict[str, Any]) -> str:
    """A short name of a teacher."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The teacher of a cache; None where there is no manifest.

    Raises:
        ReGateError: it cannot be read, or is of another format.
    """
    content = _read(directory / MANIFEST)
    return None if content is None else dict(content["teacher"])


def claim(directory: Path, identity: dict[str, Any]) -> None:
    """Make ``directory`` the cache of this teacher, or check that it is; one rank calls this.

    Raises:
        ReGateError: it belongs to another teacher, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / MANIFEST).exists():
            write_manifest(directory / MANIFEST, {"teacher": identity}, first_wins=True)
        probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise refuse(
            flag("reference_cache"),
            given=f"{directory}: {error.strerror or error}",
            allowed="a directory that can be written, seen by all planners",
            change="the path or its permissions",
        ) from error
    check(directory, identity)


def check(directory: Path, identity: dict[str, Any]) -> None:
    """Compare a cache's teacher with this run's.

    Raises:
        ReGateError: they differ; both fingerprints and the first differences are named.
    """
    theirs = read_manifest(directory) or {}
    if not (found := differences(theirs, identity)):
        return
    raise refuse(
        flag("reference_cache"),
        given=f"{directory}, made with teacher {fingerprint(theirs)[:16]} ({'; '.join(found)})",
        allowed=f"this run's teacher {fingerprint(identity)[:16]}",
        change="the directory, or the teacher",
    )


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two teachers, a few words each."""
    lines = []
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = theirs.get(name), ours.get(name)
        if name == _TOKENIZER and None in (one, other):  # nothing to compare with: the vocabulary's size has to do
            continue
        if isinstance(one, dict | None) and isinstance(other, dict | None):
            lines += differences(one or {}, other or {})
        elif not same(one, other):
            lines.append(f"{name} {_short(one)}, here {_short(other)}")
    return lines


def claim_probe(directory: Path, loss_T: Sequence[float], dtype: str) -> None:
    """Note the losses of the fixed row in a cache, or compare with those its first teacher gave; one rank calls this.

    Args:
        loss_T: see :func:`.probe.probe_rows`.
        dtype: the weights', as in the identity.

    Raises:
        ReGateError: they differ by more than rounding: it is another teacher, in something that nothing else tells.
    """
    path = directory / PROBE
    try:
        if not path.exists() and all(map(math.isfinite, loss_T)):
            write_manifest(path, {"losses": list(loss_T)}, first_wins=True)
    except OSError as error:
        raise _refused(path, f"which cannot be written ({error.strerror or error})") from error
    known_T = read_probe(directory)
    if known_T is None:  # nothing finite to compare with: the first steps will tell
        return
    mean = sum(known_T) / max(1, len(known_T))
    pairs = zip(known_T, loss_T, strict=False)
    off = sum(abs(one - other) for one, other in pairs) / max(1, len(known_T))
    if len(known_T) == len(loss_T) and off <= _TOLERANCE.get(dtype, _TOLERANCE_16_BITS) * mean:
        return
    raise refuse(
        flag("reference_cache"),
        given=f"{directory}, whose teacher gave a fixed row {mean:.4g} per token, this one is {off:.3g} off",
        allowed="the same teacher, in its settings as in its weights",
        change="the directory, or the teacher's settings",
    )


def read_probe(directory: Path) -> list[float] | None:
    """The losses of the fixed row in a cache; None where no teacher was built yet.

    Raises:
        ReGateError: they cannot be read.
    """
    content = _read(directory / PROBE)
    return None if content is None else content["losses"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_content(path)
    except FileNotFoundError:
        return None
    except OtherFormat as error:
        raise _refused(path, f"of {error}") from error
    except DamagedFile as error:
        raise _refused(path, f"with {error}") from error


def _refused(path: Path, what: str) -> Exception:
    form = {"allowed": f"a cache of format {FORMAT} as it was written, or a new directory", "change": "the directory"}
    return refuse(flag("reference_cache"), given=f"{path} {what}", **form)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
