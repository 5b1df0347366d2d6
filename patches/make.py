#!/usr/bin/env python3
"""Write the diffs of a Megatron-LM tag or commit from a checkout of it.

    python patches/make.py core_v0.19.0 CHECKOUT
    python patches/make.py main_d98e8a64dd CHECKOUT

Every training script that starts Megatron itself gets the same four lines at the head of its main block, and
SHA256SUMS.json the digests of the scripts before and after. ``apply.py`` reads both.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

SCRIPTS = ("pretrain_gpt.py", "pretrain_vlm.py", "pretrain_hybrid.py", "pretrain_mamba.py")
MAIN = 'if __name__ == "__main__":\n'
LINES = """\
    # ReGATE: its flags join Megatron's; it is attached when --regate is among them.
    from regate_megatron.integrations import megatron_lm

    megatron_lm.install_from_argv()
""".splitlines(keepends=True)


def diff_of(name: str, text: str) -> tuple[str, str]:
    """The diff of one script, and the script with it applied."""
    lines = text.splitlines(keepends=True)
    at = lines.index(MAIN) + 1
    hunk = f"@@ -{at},2 +{at},{2 + len(LINES)} @@\n"
    body = " " + MAIN + "".join("+" + line for line in LINES) + " " + lines[at]
    return f"--- a/{name}\n+++ b/{name}\n{hunk}{body}", "".join(lines[:at] + LINES + lines[at:])


def main(tag: str, checkout: str) -> None:
    """Write ``patches/<tag>/``."""
    folder, sums = Path(__file__).resolve().parent / tag, {}
    folder.mkdir(exist_ok=True)
    for name in SCRIPTS:
        script = Path(checkout, name)
        if not script.is_file() or "pretrain(" not in script.read_text():
            continue  # since 0.18 pretrain_mamba.py only runs pretrain_hybrid.py
        before = script.read_bytes().decode()
        diff, after = diff_of(name, before)
        (folder / name).with_suffix(".patch").write_text(diff)
        digests = (hashlib.sha256(text.encode()).hexdigest() for text in (before, after))
        sums[name] = dict(zip(("before", "after"), digests, strict=True))
    (folder / "SHA256SUMS.json").write_text(json.dumps(sums, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
