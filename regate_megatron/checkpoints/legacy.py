"""Megatron's legacy ``torch`` format: one pickle per tensor- and pipeline-parallel rank; read weights-only."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from regate_megatron.checkpoints.targets import TRACKER
from regate_megatron.checkpoints.trust import allowed_classes, is_distrust, megatron_classes
from regate_megatron.errors import ReGateError, refuse

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?$")


def rank_folder(tensor_rank: int, stage: int, num_stages: int) -> str:
    """The folder of one rank, as Megatron names it."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if num_stages > 1 else "")


def find_legacy(folder: str | Path) -> Path | None:
    """The folder of an iteration in the legacy format; None where ``folder`` has none."""
    root = Path(folder)
    path = root
    if (root / TRACKER).is_file():
        label = (root / TRACKER).read_text(errors="replace").strip()
        path = root / (f"iter_{int(label):07d}" if label.isdigit() else label)
    return path if any(path.glob(f"mp_rank_*/{FILE}")) else None


def read_ranks(path: Path, what: str = "--source") -> dict[tuple[int, int], dict[str, Any]]:
    """(tensor rank, pipeline stage) -> that rank's file; tensors stay on the disk until they are used.

    Raises:
        ReGateError: ranks are missing, a file is damaged, or it holds classes that are not allowed.
    """
    ranks = {}
    for folder in sorted(path.iterdir()):
        match = _RANK.match(folder.name)
        if match and (folder / FILE).is_file():
            ranks[int(match[1]), int(match[2] or 0)] = read_rank(folder / FILE, what)
        elif folder.name.startswith("mp_rank_"):
            reason = f"whose {folder.name} is incomplete or of expert-parallel ranks"
            raise _refuse(what, path, reason)
    size = max(tensor for tensor, _ in ranks) + 1, max(stage for _, stage in ranks) + 1
    missing = [(t, p) for t in range(size[0]) for p in range(size[1]) if (t, p) not in ranks]
    if missing:
        raise _refuse(what, path, f"which lacks {rank_folder(*missing[0], size[1])}")
    saved = ranks[0, 0].get("args")
    for name, found in zip(("tensor_model_parallel_size", "pipeline_model_parallel_size"), size, strict=True):
        if (wanted := getattr(saved, name, found)) != found:
            raise _refuse(what, path, f"with the folders of {name} {found}, saved with {wanted}")
    return ranks


def read_rank(file: Path, what: str) -> dict[str, Any]:
    """One rank's file, unpickled with an allow-list: tensors, plain values and Megatron's own argument classes.

    Raises:
        ReGateError: it is damaged or holds anything else.
    """
    try:
        with allowed_classes(megatron_classes()):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise whatever they like
        reason = _reason(error)
        raise refuse(
            what,
            given=f"{file}, which is damaged or holds more than weights and arguments ({reason})",
            allowed="a file that torch.load(weights_only=True) reads with Megatron's safe classes",
            change="it: load it with the Megatron that wrote it and save with --ckpt-format torch_dist",
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        given = "with virtual pipeline stages (model0, model1, …)" if "model0" in state else "without a model"
        raise _refuse(what, file, given)
    return state


def write_rank(folder: Path, weights: dict[str, torch.Tensor], arguments: Namespace) -> None:
    """Write one rank's file: weights, arguments, no optimizer."""
    folder.mkdir(parents=True)
    torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "model": weights}, folder / FILE)


def _reason(error: Exception) -> str:
    """What torch's message comes down to."""
    text = str(error)
    if is_distrust(error):
        found = re.search(r"GLOBAL (\S+)", text)
        return f"it would import {found[1]}" if found else "a class that is not allowed"
    if "zip" in text:
        return "no whole file of torch.save"
    return text.split("\n")[0][:100]


def _refuse(what: str, path: Path, given: str) -> ReGateError:
    return refuse(
        what,
        given=f"{path}, {given}",
        allowed="a complete checkpoint of dense layers with --ckpt-format torch",
        change="it, or save it again with --ckpt-format torch_dist",
    )
