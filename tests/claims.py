"""Claims that are functions of a worker: all are checked in one launch, and each is a test of its own."""

from __future__ import annotations

import ast
import os
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def claims_of(worker: Path, helpers: Collection[str]) -> list[str]:
    """Names of a worker's functions that are claims; the worker is not imported."""
    functions = (node.name for node in ast.parse(worker.read_text()).body if isinstance(node, ast.FunctionDef))
    return [name for name in functions if name not in helpers]


def check(names: Sequence[str], functions: Mapping[str, Any]) -> None:
    """On the one rank of a worker: say of every claim whether it holds."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group(backend="gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for name in names:
        for variable in [one for one in os.environ if one.startswith("NVTE_")]:  # Megatron's, of the model before
            del os.environ[variable]
        try:
            functions[name]()
            print(f"holds: {name}", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"fails: {name}", flush=True)
    dist.destroy_process_group()
