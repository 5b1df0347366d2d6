"""Whose losses a cache holds: ``manifest.json`` names the teacher, and a run with another one is refused.

The first run writes it; every later one compares. What it lists is what a reference loss depends on beside the sample:
the weights, the architecture, the vocabulary, how visual positions are read, and the precision of the forward.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import xxhash

from regate_megatron.config import flag
from regate_megatron.errors import refuse
from regate_megatron.teacher.cache_files import sync_folder

MANIFEST = "manifest.json"
FORMAT = 1
_ARCHITECTURE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *(
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "apply_residual_connection_post_layernorm",
    ),
    *("add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func", "qk_layernorm", "softmax_scale"),
    *("rotary_interleaved", "multi_latent_attention", "window_size", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("num_moe_experts", "moe_router_topk", "moe_router_score_function", "moe_ffn_hidden_size", "moe_layer_freq"),
    *("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size", "moe_router_pre_softmax"),
)
_MODEL = ("position_embedding_type", "rotary_percent", "rotary_base", "rotary_scaling", "max_sequence_length")


def teacher_identity(
    model: Any,
    *,
    weights: str,
    vocab_size: int,
    tokenizer: str | None,
    visual: str,
    pad_token: int | None,
) -> dict[str, Any]:
    """All that a reference loss depends on beside the sample, as plain values; the same on every rank and layout.

    Args:
        model: a language model of the teacher's architecture.
        weights: see :mod:`.fingerprint`.
        vocab_size: rows of the teacher's output layer, padding included (padding takes part in the softmax).
        tokenizer: a hash of the tokenizer, None where none could be made.
    """
    architecture = {name: _plain(getattr(model.config, name)) for name in _ARCHITECTURE if hasattr(model.config, name)}
    learned = model.position_embedding_type == "learned_absolute"
    architecture |= {
        name: _plain(getattr(model, name))
        for name in _MODEL
        if hasattr(model, name) and (learned or name != "max_sequence_length")
    }
    return {
        "weights": weights,
        "architecture": architecture,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "visual": visual if visual == "drop" else f"pad with {pad_token}",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def fingerprint(identity: dict[str, Any]) -> str:
    """A short name of a teacher."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The teacher of a cache; None where there is no manifest.

    Raises:
        ReGateError: it cannot be read, or is of another format.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["format"] == FORMAT:
            return dict(content["teacher"])
        given = f"{path} of format {content['format']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = f"{path}, unreadable ({error})"
    raise refuse(
        flag("reference_cache"),
        given=given,
        allowed=f"a cache of format {FORMAT}, or a new directory",
        change="the directory",
    )


def claim(directory: Path, identity: dict[str, Any]) -> None:
    """Make ``directory`` the cache of this teacher, or check that it is; one rank calls this.

    Raises:
        ReGateError: it belongs to another teacher, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / MANIFEST).exists():
            _create(directory / MANIFEST, json.dumps({"format": FORMAT, "teacher": identity}, indent=1))
        probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise refuse(
            flag("reference_cache"),
            given=f"{directory}: {error.strerror or error}",
            allowed="a directory that can be written, seen by all planners",
            change="the path or its permissions",
        ) from error
    check(directory, identity)


def check(directory: Path, identity: dict[str, Any]) -> None:
    """Compare a cache's teacher with this run's.

    Raises:
        ReGateError: they differ; both fingerprints and the first differences are named.
    """
    theirs = read_manifest(directory) or {}
    known = dict(identity)
    for side, other in ((known, theirs), (theirs, known)):
        if side.get("tokenizer") is None:  # nothing to compare with: the vocabulary's size has to do
            other["tokenizer"] = None
    if theirs == known:
        return
    raise refuse(
        flag("reference_cache"),
        given=f"{directory}, made with teacher {fingerprint(theirs)[:16]} ({'; '.join(_differences(theirs, known))})",
        allowed=f"this run's teacher {fingerprint(known)[:16]}",
        change="the directory, or the teacher",
    )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    lines = []
    for name in ours:
        if isinstance(ours[name], dict):
            lines += _differences(theirs.get(name) or {}, ours[name])
        elif theirs.get(name) != ours[name]:
            lines.append(f"{name} {theirs.get(name)}, here {ours[name]}")
    return lines


def _create(path: Path, text: str) -> None:
    """Create a file whole, unless somebody else did meanwhile."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | str | list | None) else str(value)
