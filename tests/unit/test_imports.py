"""Importing the package, and its pure core, imports no Megatron and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = (
    "config",
    "errors",
    "method.schedule",
    "method.scores",
    "method.budget",
    "method.balance",
    "method.selection",
    "decoder.cutting",
    "method.plan",
    "ranks.topology",
    "memory.difficulty",
    "memory.records",
    "memory.files",
)

# Imports each module named on its command line; prints, by module, what that import did beyond defining the module.
PROBE = """
import argparse, importlib, inspect, json, os, signal, sys, warnings
import torch, torch.distributed

WATCHED = (torch, torch.cuda, torch.Tensor, torch.distributed, torch.autograd, torch.nn.Module, torch.nn.functional,
           argparse, argparse.ArgumentParser, os)

def names():
    return {f'{place.__name__}.{name}': id(value) for place in WATCHED for name, value in vars(place).items()
            if not inspect.ismodule(value) and not name.startswith('__')}

def process():
    return {'environment': dict(os.environ), 'path': list(sys.path), 'argv': list(sys.argv), 'hook': sys.excepthook,
            'finders': list(sys.meta_path), 'dtype': torch.get_default_dtype(), 'threads': torch.get_num_threads(),
            'grad': torch.is_grad_enabled(), 'seed': torch.initial_seed(), 'rng': torch.get_rng_state().tolist(),
            'group': torch.distributed.is_initialized(), 'warnings': list(warnings.filters),
            'handlers': [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]}

report = {}
for module in sys.argv[1:]:
    before = names(), process()
    importlib.import_module(module)
    after = names(), process()
    report[module] = sorted(
        [f'imported {name}' for name in sys.modules if name in ('megatron', 'apex', 'transformer_engine')]
        + [f'changed {name}' for old, new in zip(before, after) for name in {**old, **new}
           if old.get(name) != new.get(name)]
    )
print(json.dumps(report))
"""


def _probe(*modules: str, folder: Path = ROOT) -> dict[str, list[str]]:
    command = [sys.executable, "-c", PROBE, *modules]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_importing_the_package_and_its_pure_core_imports_no_megatron_and_changes_nothing():
    modules = ["regate_megatron", *(f"regate_megatron.{name}" for name in CORE)]
    assert _probe(*modules) == {module: [] for module in modules}


def test_the_probe_would_see_a_change_and_an_import(tmp_path):
    (tmp_path / "megatron.py").write_text("")
    (tmp_path / "culprit.py").write_text(
        "import os, torch, megatron\ntorch.Tensor.cuda = None\ntorch.manual_seed(3)\nos.environ['REGATE_PROBE'] = '1'\n"
    )
    seen = _probe("culprit", folder=tmp_path)["culprit"]
    assert "changed Tensor.cuda" in seen and "changed environment" in seen
    assert "changed seed" in seen and "imported megatron" in seen
