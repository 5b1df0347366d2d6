"""Tiny Hugging Face models, written offline by transformers, and the tools as functions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def tool(name: str) -> ModuleType:
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: ModuleType, *arguments: object) -> None:
    """Run a tool that must succeed."""
    assert program.main([str(argument) for argument in arguments]) == 0


def refusal(program: ModuleType, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Run a tool that must refuse; its one line."""
    capsys.readouterr()
    assert program.main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("regate: "), lines
    assert all(word in lines[0] for word in ("given", "allowed", "change"))
    return lines[0]


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight a value that matters: biases are not zero, norms are not one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return model


def write_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, *, shard: str = "50GB", **options) -> Path:
    """A causal language model of a family with random weights, in safetensors; "llama", "qwen2", …"""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SMALL | options)
    model = fill(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_bits(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and bytes are equal."""
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def edit_config(folder: Path, **values) -> None:
    """Change values in config.json; None removes."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
