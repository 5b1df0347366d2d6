"""Files in loads: what pack.py sends and the part setup takes in. Large files are cut; every piece has its SHA-256.

A parcel is a folder of loads ``01``, ``02``, …, none larger than a limit, for machines that take files a little at a
time. Every load has the whole ``MANIFEST.json``, so that setup can say which loads are still missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regate_megatron.errors import refuse

MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(files: Sequence[Path], folder: Path, limit: int, about: dict[str, Any]) -> dict[str, Any]:
    """Lay files into loads of at most ``limit`` bytes each (the manifest comes on top), and return the manifest.

    Args:
        folder: an earlier parcel in it is removed.
        about: what else the manifest says.

    Raises:
        ReGateError: the folder holds something else.
    """
    if folder.exists():
        if any(folder.iterdir()) and not any(folder.glob(f"*/{MANIFEST}")):
            given = f"{folder}, which is no parcel and not empty"
            raise refuse("--parcel", given=given, allowed="a new folder, or an earlier parcel", change="the path")
        shutil.rmtree(folder)
    entries, pieces = [], []
    for path in sorted(files, key=lambda one: -one.stat().st_size):
        size = path.stat().st_size
        count = max(1, -(-size // limit))
        names = [path.name] if count == 1 else [f"{path.name}.part{index:02d}" for index in range(count)]
        entries.append({"name": path.name, "bytes": size, "sha256": sha256(path), "pieces": []})
        pieces += [(entries[-1], path, name, index * limit) for index, name in enumerate(names)]
    room: list[int] = []
    for entry, path, name, start in pieces:
        size = min(limit, entry["bytes"] - start)
        load = next((number for number, left in enumerate(room) if left >= size), len(room))
        if load == len(room):
            room.append(limit)
        room[load] -= size
        target = folder / f"{load + 1:02d}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, start, size, target)
        entry["pieces"].append({"load": load + 1, "file": name, "sha256": sha256(target)})
    manifest = {**about, "loads": len(room), "files": entries}
    for load in range(len(room)):
        (folder / f"{load + 1:02d}" / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(parcel: Path) -> dict[str, Any]:
    """The manifest of a parcel, from whichever load has arrived.

    Raises:
        ReGateError: there is none, or loads of two parcels are mixed.
    """
    found = {path.read_text() for path in parcel.glob(f"*/{MANIFEST}")}
    if len(found) != 1:
        given = f"{parcel} without a load" if not found else f"loads of {len(found)} parcels in {parcel}"
        raise refuse("--parcel", given=given, allowed="the loads that one run of pack.py made", change="what is in it")
    return json.loads(found.pop())


def missing_loads(manifest: dict[str, Any], parcel: Path) -> list[int]:
    """Numbers of loads of which a piece has not arrived."""
    return sorted(
        {
            piece["load"]
            for entry in manifest["files"]
            for piece in entry["pieces"]
            if not (parcel / f"{piece['load']:02d}" / piece["file"]).is_file()
        }
    )


def unpack(manifest: dict[str, Any], parcel: Path, folder: Path) -> list[Path]:
    """Join and check all files into ``folder``; what is there already and right is left alone.

    Raises:
        ReGateError: a piece or a whole file is not what was sent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in manifest["files"]:
        target = folder / entry["name"]
        found.append(target)
        if target.is_file() and sha256(target) == entry["sha256"]:
            continue
        aside = target.with_name(target.name + ".incomplete")
        with aside.open("wb") as file:
            for piece in entry["pieces"]:
                source = parcel / f"{piece['load']:02d}" / piece["file"]
                if sha256(source) != piece["sha256"]:
                    raise _damaged(source)
                with source.open("rb") as part:
                    shutil.copyfileobj(part, file, _BLOCK)
        if sha256(aside) != entry["sha256"]:
            raise _damaged(aside)
        os.replace(aside, target)
    return found


def _copy(path: Path, start: int, size: int, target: Path) -> None:
    with path.open("rb") as source, target.open("wb") as file:
        source.seek(start)
        while size:
            block = source.read(min(_BLOCK, size))
            file.write(block)
            size -= len(block)


def _damaged(path: Path) -> Exception:
    return refuse(
        "--parcel",
        given=f"{path.name} with another SHA-256 than was sent",
        allowed="files as pack.py left them",
        change="bring that load again",
    )
