"""Part setup: whether what the other parts import is there, each in a fresh process; docs/gpu.md has the commands.

What holds: each statement imports. Transformer Engine is asked for last and may be missing: parity and step_time then
run with Megatron's local layers, and fp8 is skipped.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

from benchmarks.gpu.results import Results

IMPORTS = (
    "import torch, megatron.core",
    "import xxhash, tqdm",
    "import regate_megatron.api",
)
TRANSFORMER_ENGINE = "import torch, transformer_engine.pytorch"


def run(options: Any) -> int:
    """The part; returns the exit code."""
    results = Results(options)
    for statement in IMPORTS:
        results.measure(statement, 0, functools.partial(imports, statement))
    found = imports(TRANSFORMER_ENGINE)
    if found["holds"]:
        results.measure(TRANSFORMER_ENGINE, 0, lambda: found)
    else:
        results.skip(TRANSFORMER_ENGINE, found["said"])
    return results.finish()


def imports(statement: str) -> dict[str, Any]:
    """Run an import in a fresh process; what it said last where it failed."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return {"holds": not done.returncode, "said": " ".join(said)}
