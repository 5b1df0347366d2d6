"""``python -m regate_megatron doctor``: what this environment has, and what is supported. No communication.
With ``--model NAME_OR_FOLDER``: whether a Hugging Face model is supported, in which host, and how.

Exit code 0, or 1 where training with ReGATE could not start here, or the model is not supported. What is not installed
is not imported.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from regate_megatron import compat
from regate_megatron.errors import ReGateError, refuse
from regate_megatron.support import RULES, models

_WIDTH = 116


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``state`` is "ok", "note" or "FAIL"."""

    state: str
    text: str


def main(argv: list[str] = ()) -> int:
    """Print the report, or with ``--model NAME_OR_FOLDER`` what is known of a model; returns the exit code."""
    if argv:
        return _model(argv[0], " ".join(argv[1:]))
    findings = [finding for check in CHECKS for finding in check()]
    print("environment")
    for finding in findings:
        _print(f"  {finding.state:<4}  ", finding.text)
    print("\nrefused before step 0, unless as allowed")
    for rule in RULES:
        _print("  ", f"{rule.what}: allowed {rule.allowed} ({rule.why}); change {rule.change}")
    failed = sum(finding.state == "FAIL" for finding in findings)
    notes = sum(finding.state == "note" for finding in findings)
    print(f"\n{len(findings) - failed - notes} ok, {notes} to know, {failed} failed")
    return 1 if failed else 0


def _model(option: str, name: str) -> int:
    if option != "--model" or not name:
        given = f"{option} {name}".strip()
        change = f"it to --model {name or ('NAME_OR_FOLDER' if option.startswith('-') else option)}"
        print(refuse("doctor", given=given, allowed="--model NAME_OR_FOLDER", change=change), file=sys.stderr)
        return 1
    try:
        verdict = models.judge(models.config_of(name))
    except ReGateError as error:
        print(error, file=sys.stderr)
        return 1
    for line in verdict.lines():
        _print("  ", line)
    return 1 if verdict.reasons else 0


def _print(head: str, text: str) -> None:
    indent = {"initial_indent": head, "subsequent_indent": " " * len(head)}
    print(textwrap.fill(text, _WIDTH, **indent, break_on_hyphens=False, break_long_words=False))  # flags stay whole


def check_python() -> Iterator[Finding]:
    """Python is as young as the package asks for."""
    found = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok" if sys.version_info >= (3, 12) else "FAIL", f"python {found} (3.12 or later)")


def check_packages() -> Iterator[Finding]:
    """What the package imports is installed."""
    for name in ("numpy", "xxhash", "tqdm"):
        found = _version(name)
        yield Finding("ok", f"{name} {found}") if found else Finding("FAIL", f"no {name}: pip install {name}")


def check_torch() -> Iterator[Finding]:
    """torch is there, and what it can compute on."""
    if not _version("torch"):
        yield Finding("FAIL", "no torch: install the build for your GPU, or torch for the CPU")
        return
    try:
        import torch
    except Exception as fault:  # a broken installation fails in many ways
        yield Finding("FAIL", f"torch {_version('torch')} cannot be imported: {fault}")
        return
    yield Finding(
        "ok" if compat.numbers(torch.__version__) >= (2, 6) else "FAIL", f"torch {torch.__version__} (2.6 or later)"
    )
    if not torch.cuda.is_available():
        yield Finding("note", "no GPU is visible: only -m regate_megatron --cpu SCRIPT runs here")
        return
    yield Finding("ok", f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    if torch.distributed.is_nccl_available():
        yield Finding("ok", "NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("FAIL", "this torch has no NCCL: install a CUDA build of it")


def check_megatron() -> Iterator[Finding]:
    """megatron-core is of a version that was tried, from a wheel or a checkout on the path."""
    found = compat.find_megatron()
    if found is None:
        yield Finding("FAIL", "no megatron-core: pip install megatron-core==0.19.2, or run a script of a checkout")
        return
    version, folder = found
    known = compat.is_known_megatron(version)
    proven = "" if compat.numbers(version) == (0, 19) else f"; proven: {compat.MEGATRON_CORE}"
    yield Finding("ok" if known else "FAIL", f"megatron-core {version} in {folder} ({compat.MEGATRON_CORE}{proven})")
    if util.find_spec("megatron.training") is None:
        yield Finding("note", "no megatron.training: the Python interface works, the launcher needs it")


def check_transformer_engine() -> Iterator[Finding]:
    """Transformer Engine is optional."""
    found = _version("transformer-engine")
    yield (
        Finding("ok", f"transformer-engine {found}")
        if found
        else Finding("note", "no transformer-engine: --transformer-impl local only, no FP8")
    )


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex is optional; the apex of PyPI is an unrelated project that Megatron would import."""
    spec = util.find_spec("apex")
    if spec is None:
        yield Finding("note", "no apex: optional")
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        yield Finding("ok", "apex is NVIDIA's")
    else:
        yield Finding("FAIL", "apex is PyPI's unrelated project: pip uninstall apex; NVIDIA's is built from source")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_torch,
    check_megatron,
    check_transformer_engine,
    check_apex,
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
