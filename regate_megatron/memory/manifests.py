"""Manifests: small JSON files that say what a folder holds, with the format's number and a checksum of themselves.

The number is one for all that this room writes. It goes up when files or content keys become others, so that what an
earlier version left is refused by name instead of read as damaged or never found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from regate_megatron.memory.files import DamagedFile
from regate_megatron.ranks.publishing import write_aside

FORMAT = 3  # 1 and 2 were numpy files of saved state, and Arrow files of reference losses


class OtherFormat(DamagedFile):
    """A manifest that another version wrote."""


def write_manifest(path: Path, content: dict[str, Any], *, first_wins: bool = False) -> None:
    """Write plain values; see :func:`write_aside`."""
    body = dict(content, format=FORMAT)
    text = json.dumps(dict(body, checksum=_checksum_of(body)), indent=1)
    write_aside(path, text.encode(), first_wins=first_wins)


def read_manifest(path: Path) -> dict[str, Any]:
    """What was written.

    Raises:
        OtherFormat: by another version of this library.
        DamagedFile: it is not what was written.
        FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_text())
        number = content.pop("format", content.get("version"))  # the first ones had a version
        checksum = content.pop("checksum", None)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"unreadable content ({type(error).__name__})") from error
    if number != FORMAT:
        raise OtherFormat(f"format {number}")
    if checksum != _checksum_of(dict(content, format=FORMAT)):
        raise DamagedFile("a wrong checksum")
    return content


def _checksum_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
