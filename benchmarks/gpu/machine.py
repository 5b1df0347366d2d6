"""The machine a part runs on: what it must have, starting one rank on it, and saying what it is.

Every check returns ``(ok, reason)``; the reason goes into refusals and into the list of what was skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regate_megatron.errors import refuse

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn", "triton")


def check_gpu() -> tuple[bool, str]:
    """Whether torch sees a GPU of compute capability 8.0 or more."""
    import torch

    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return (True, "") if major >= 8 else (False, f"compute capability {major}.{minor}, below 8.0")


def check_packages() -> tuple[bool, str]:
    """Whether what every part imports is there."""
    missing = [name for name in ("torch", "megatron.core", "xxhash", "tqdm") if not _is_there(name)]
    return not missing, f"no {', '.join(missing)}: docs/gpu.md says how to install" if missing else ""


def check_transformer_engine() -> tuple[bool, str]:
    """Whether Transformer Engine's layers can run: its torch extension loads, and there is a GPU."""
    try:
        import torch  # noqa: F401  Transformer Engine's library finds NCCL once torch has loaded it
        import transformer_engine.pytorch  # noqa: F401
    except Exception as fault:
        return False, f"Transformer Engine does not import: {str(fault).splitlines()[0] if str(fault) else fault!r}"
    return check_gpu()


def check_recipe(recipe: str) -> tuple[bool, str]:
    """Whether the chip has an FP8 recipe, by Megatron's name of it; Transformer Engine knows."""
    ok, reason = check_transformer_engine()
    if not ok:
        return ok, reason
    from transformer_engine.pytorch import quantization

    asks = {"mxfp8": quantization.is_mxfp8_available, "blockwise": quantization.is_fp8_block_scaling_available}
    return asks.get(recipe, quantization.is_fp8_available)(return_reason=True)


def _is_there(name: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(name) is not None
    return False


@contextlib.contextmanager
def one_rank(options: Any) -> Iterator[Any]:
    """Megatron's groups on one rank: NCCL on the GPU, or gloo under the package's emulation in a rehearsal.

    Yields:
        torch.device of the models.

    Raises:
        ReGateError: the machine lacks something.
    """
    if options.cpu_rehearsal:
        from regate_megatron.cpu import emulation

        emulation.set_environment()
    ok, reason = check_packages()
    if ok and not options.cpu_rehearsal:
        ok, reason = check_gpu()
    if not ok:
        raise refuse(
            f"benchmarks/gpu/run.py {options.part}",
            given=reason,
            allowed="a machine as docs/gpu.md describes it",
            change="the machine, or add --cpu-rehearsal",
        )
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # a machine without a network may not know its own name
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if options.cpu_rehearsal:
        emulation.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    device = torch.device("cpu" if options.cpu_rehearsal else "cuda:0")
    if not options.cpu_rehearsal:
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    try:
        yield device
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def describe(options: Any) -> dict[str, Any]:
    """Hardware, versions and commit, for the head of a result; no names of hosts or people."""
    found = {
        "rehearsal": options.cpu_rehearsal,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": options.commit or describe_commit(),
        "source_sha256": source_digest(),
        **{name: _version(name) for name in PACKAGES},
    }
    with contextlib.suppress(ImportError):
        import torch

        found["cuda"] = torch.version.cuda
        if not options.cpu_rehearsal and torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found["gpu"] = properties.name
            found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            found["driver"] = _driver()
    return found


def source_digest() -> str:
    """SHA-256 over the package's Python files, names and contents in order: what ran, whatever the commit says."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "regate_megatron").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def describe_commit() -> str | None:
    """The commit of the tree, with ``-dirty`` where something is changed; None without git."""
    return _answer(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"])


def _driver() -> str | None:
    answer = _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0] if answer else None


def _answer(command: list[str]) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None
