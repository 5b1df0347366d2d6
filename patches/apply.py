#!/usr/bin/env python3
"""Put ReGATE's flags into a Megatron-LM checkout's own scripts, and take them out again.

    python patches/apply.py check  CHECKOUT      say what state the checkout is in; exit code 1 if it fits no patch
    python patches/apply.py apply  CHECKOUT
    python patches/apply.py revert CHECKOUT

Each folder beside this file is named after a Megatron-LM tag or commit and holds one diff per script and
SHA256SUMS.json: the digest of every script before and after. A script with any other content is left alone. No git, no
patch program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from regate_megatron.errors import ReGateError, refuse

PATCHES = Path(__file__).resolve().parent
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Patch:
    """One diff of one tag: turns ``script`` with digest ``before`` into the one with digest ``after``."""

    tag: str
    script: str
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The text of the diff."""
        return (PATCHES / self.tag / self.script).with_suffix(".patch").read_text()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "apply", "revert"))
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="root of a Megatron-LM checkout")
    options = parser.parse_args(argv)
    try:
        for line in run(options.command, options.checkout):
            print(line)
    except ReGateError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(command: str, checkout: Path) -> list[str]:
    """Check, apply or revert; returns one line per script. Nothing is written unless every script fits.

    Raises:
        ReGateError: no checkout, a script of another version or edited by others, or no right to write.
    """
    tag, states = find_tag(checkout)
    lines = []
    for patch, applied in states:
        path = checkout / patch.script
        if command != "check" and applied == (command == "revert"):
            content = patched(path.read_bytes(), patch.diff, reverse=applied)
            wanted = patch.before if applied else patch.after
            assert _digest(content) == wanted, f"{patch.script}.patch does not lead to the digest beside it"
            _replace(path, content)
            lines.append(f"{path}: {'reverted to' if applied else 'patched, from'} {tag}")
        elif command == "check":
            lines.append(f"{path}: {tag}, {'patched' if applied else 'not patched'}")
        else:
            lines.append(f"{path}: {'patched already' if applied else 'not patched'}, nothing to do")
    return lines


def known_patches() -> list[Patch]:
    """Every patch beside this file."""
    return [
        Patch(sums.parent.name, script, digests["before"], digests["after"])
        for sums in sorted(PATCHES.glob("*/SHA256SUMS.json"))
        for script, digests in json.loads(sums.read_text()).items()
    ]


def find_tag(checkout: Path) -> tuple[str, list[tuple[Patch, bool]]]:
    """The tag whose scripts the checkout holds, and for each of its patches whether it is applied.

    Raises:
        ReGateError: the scripts are those of no tag there are patches for.
    """
    patches = known_patches()
    tags = list(dict.fromkeys(patch.tag for patch in patches))
    odd = ""
    for tag in tags:
        states = []
        for patch in (one for one in patches if one.tag == tag):
            path = checkout / patch.script
            digest = _digest(path.read_bytes()) if path.is_file() else None
            if digest not in (patch.before, patch.after):
                odd = f"{path}, " + (f"whose sha256 starts with {digest[:12]}" if digest else "which does not exist")
                break
            states.append((patch, digest == patch.after))
        else:
            return tag, states
    raise refuse(
        "CHECKOUT",
        given=odd,
        allowed=f"Megatron-LM's own script of {', '.join(tags)}, with or without our patch",
        change="the checkout, or merge the diff by hand with git apply",
    )


def patched(content: bytes, diff: str, *, reverse: bool = False) -> bytes:
    """``content`` with the hunks of a unified diff applied; every line that a hunk names must be where it says.

    Raises:
        ValueError: a line differs.
    """
    lines, result, done = content.decode().splitlines(keepends=True), [], 0
    gone, come = ("+", "-") if reverse else ("-", "+")
    for row in diff.splitlines(keepends=True):
        if match := _HUNK.match(row):
            start, count = (int(match[i]) if match[i] else 1 for i in ((3, 4) if reverse else (1, 2)))
            begin = start - 1 if count else start
            result += lines[done:begin]
            done = begin
        elif not row.startswith(("---", "+++")):
            if row[0] in (" ", gone):
                if lines[done] != row[1:]:
                    raise ValueError(f"line {done + 1} is {lines[done]!r}, the diff expects {row[1:]!r}")
                done += 1
            if row[0] in (" ", come):
                result.append(row[1:])
    return "".join(result + lines[done:]).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".regate-incomplete")
    try:
        aside.write_bytes(content)
        shutil.copymode(path, aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise refuse(
            "CHECKOUT", given=f"{path}: {error.strerror}", allowed="a writable checkout", change="it"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
