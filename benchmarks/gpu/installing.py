"""Part setup: what pack.py sent becomes a folder of packages beside the machine's own, with Transformer Engine built.

Files are joined and checked, packages that the machine has already are left alone (torch is never brought), the torch
extension of Transformer Engine is built from source against the torch that is there (a few minutes on 16 cores; a wheel
sent along with ``pack.py --built`` is used in its place if it loads), and everything goes into ``--site`` in one pip
call, aside and renamed. Nothing is downloaded. What holds: each package imports in a fresh process.

In a rehearsal nothing is built; without a parcel only the imports are tried.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.gpu import parcel
from benchmarks.gpu.results import Results
from regate_megatron.errors import refuse

OURS = re.compile(r"(megatron_core|omegaconf|transformer_engine|nvdlfw|pydantic|annotated_types|typing_)")
EXTENSION = "transformer_engine_torch"
MARK = ".regate-site"  # in a folder that was made here, which the next call may replace
IMPORTS = (
    "import torch, megatron.core",
    "import xxhash, pyarrow, tqdm",
    "import regate_megatron.api",
    "import torch, transformer_engine.pytorch",
)


def run(options: Any) -> int:
    """The part; returns the exit code.

    Raises:
        ReGateError: loads are missing or damaged, or pip or the build fails.
    """
    results = Results(options, site=options.site.name)
    if options.cpu_rehearsal and not options.parcel.is_dir():
        results.skip("install", "no parcel here")
    else:
        manifest = arrived(options.parcel)
        results.measure("install", 0, functools.partial(install, manifest, options))
    for statement in IMPORTS:
        if options.cpu_rehearsal and "transformer_engine" in statement:
            results.skip(statement, "not built in a rehearsal")
        else:
            results.measure(statement, 0, functools.partial(imports, statement))
    return results.finish()


def arrived(folder: Path) -> dict[str, Any]:
    """The manifest of a parcel that is whole.

    Raises:
        ReGateError: loads are missing.
    """
    manifest = parcel.read_manifest(folder)
    missing = parcel.missing_loads(manifest, folder)
    if missing:
        loads = ", ".join(f"{load:02d}" for load in missing)
        raise refuse(
            "--parcel", given=f"no load {loads}", allowed="all loads", change="what is carried, and run it again"
        )
    return manifest


def install(manifest: dict[str, Any], options: Any) -> dict[str, Any]:
    """Join, check, build, install; what went where."""
    if options.site.is_dir() and any(options.site.iterdir()) and not (options.site / MARK).is_file():
        given = f"{options.site}, which was not made here"
        raise refuse("--site", given=given, allowed="a new folder, or one of this part", change="the path")
    files = parcel.unpack(manifest, options.parcel, options.parcel.parent / "gpu-wheels-joined")
    wheels = [path for path in files if path.suffix == ".whl" and not path.name.startswith(EXTENSION)]
    wheels = [path for path in wheels if OURS.match(path.name) or not is_installed(path)]
    if options.cpu_rehearsal:  # without its extension Transformer Engine does not even let Megatron import
        wheels = [path for path in wheels if not path.name.startswith("transformer_engine")]
    found = {"packages": [path.name for path in wheels], "pack_commit": manifest["commit"]}
    source = next((path for path in files if path.name.startswith(EXTENSION) and path.suffix == ".gz"), None)
    sent = next((path for path in files if path.name.startswith(EXTENSION) and path.suffix == ".whl"), None)
    aside = options.site.with_name(options.site.name + ".incomplete")
    put(wheels, aside)
    if source is not None and not options.cpu_rehearsal:
        extension = None
        if sent is not None:
            put([*wheels, sent], aside)
            extension = sent if loads(aside) else None
            found["extension"] = "the one sent along" if extension else "built here: the one sent along does not load"
        if extension is None:
            put(wheels, aside)
            extension = build(source, aside, options)
            found.setdefault("extension", "built here")
        put([*wheels, extension], aside)
    (aside / MARK).touch()
    shutil.rmtree(options.site, ignore_errors=True)
    os.replace(aside, options.site)
    return {"holds": True, **found}


def is_installed(wheel: Path) -> bool:
    """Whether the machine has this package in any version, outside the site folder."""
    try:
        importlib.metadata.distribution(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def put(wheels: list[Path], folder: Path) -> None:
    """Install wheels into an emptied folder, all in one call: two would not share a package's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip("install", "--no-compile", "--no-cache-dir", "--target", str(folder), *map(str, wheels))


def build(source: Path, site: Path, options: Any) -> Path:
    """Build the torch extension against the torch that is here; headers come with torch's own CUDA packages.

    Returns:
        the wheel, kept beside the joined files for the next call on this machine.
    """
    import torch

    target = source.parent / f"built-{torch.__version__}"
    done = sorted(target.glob("*.whl"))
    if done:
        return done[-1]
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    headers = [nvidia / name / "include" for name in ("cu13", "cudnn", "nccl")]
    cuda = os.environ.get("CUDA_HOME") or next((str(path) for path in [Path("/usr/local/cuda")] if path.is_dir()), "")
    compiler = shutil.which("nvcc") or f"{cuda}/bin/nvcc"
    if not Path(compiler).is_file():
        raise refuse("setup", given="no nvcc", allowed="CUDA's compiler of torch's version", change="the machine")
    environment = {
        "CPATH": os.pathsep.join([*(str(path) for path in headers if path.is_dir()), os.environ.get("CPATH", "")]),
        "CUDA_HOME": cuda or str(Path(compiler).parents[1]),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "MAX_JOBS": str(os.cpu_count()),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),  # ninja's place
    }
    aside = target.with_name(target.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(aside), str(source), environment=environment)
    os.replace(aside, target)
    return next(iter(target.glob("*.whl")))


def pip(command: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Run pip without an index.

    Raises:
        ReGateError: it failed; with the end of what it said.
    """
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-index", "--no-deps", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-8000:], file=sys.stderr, flush=True)
        given = f"pip {command}, which ended with {done.returncode}"
        raise refuse("setup", given=given, allowed="a build and an installation without faults", change="see above")


def loads(site: Path) -> bool:
    """Whether Transformer Engine imports from a folder, in a fresh process."""
    return not imports(IMPORTS[-1], site)["said"]


def imports(statement: str, site: Path | None = None) -> dict[str, Any]:
    """Run an import in a fresh process."""
    path = os.pathsep.join([*([str(site)] if site else []), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return {"holds": not done.returncode, "said": " ".join(said)}
