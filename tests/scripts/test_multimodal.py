"""NVIDIA's examples/multimodal/train.py of core 0.17.1: energon's loader, a Hugging Face tokenizer, pictures.

Needs torchvision, megatron-energon[av_decode] 6 and transformers 4; without Transformer Engine upstream can build its
projector for one language model only (mistral_7b), and its norms as LayerNorm only.
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

from tests.launch import ROOT, succeed, torchrun
from tests.scripts import multimodal
from tests.scripts.checkouts import HERE, LIMIT_S, losses, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())
SPARSE_AT_ONCE = "--regate --regate-score regate --regate-warmup-steps 1 --regate-dense-steps 0".split()
SPARSE_AT_ONCE += ["--regate-teacher-load", "student"]


def _missing() -> str:
    """What is not installed here; empty where nothing is missing."""
    needed = {"torchvision": "torchvision", "webdataset": "megatron-energon[av_decode]", "av": "the same"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    import transformers

    return "" if transformers.__version__.startswith("4.") else f"transformers {transformers.__version__}, not 4"


@pytest.fixture
def flags(checkout, tmp_path, record_property) -> list[str]:
    """The command line, and what it reads."""
    if not checkout.version.startswith("0.17."):
        record_property("outcome", "broken upstream")
        pytest.skip("upstream cannot start it: see docs/versions.md")
    if missing := _missing():
        pytest.skip(missing)
    multimodal.write_tokenizer(tmp_path / "tokenizer")
    multimodal.write_dataset(tmp_path / "captions")
    return multimodal.flags(tmp_path, checkout.path)


def test_multimodal_training_starts_sparse_steps(checkout, flags):
    script = checkout.path / "examples/multimodal/train.py"
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, checkout.path)))}
    trained = {}
    launcher = ["-m", "regate_megatron", "--cpu", HERE / "multimodal.py", script]
    for name, ours in (("plain", []), ("sparse", SPARSE_AT_ONCE)):
        command = [*launcher, *flags, "--train-iters", "2", *ours]
        trained[name] = succeed(1, command, how=torchrun, timeout_s=LIMIT_S, env=env).output
    sparse, plain = losses(trained["sparse"]), losses(trained["plain"])
    assert len(sparse) == len(plain) == 2 and sparse[0] == plain[0] and sparse[1] != plain[1]
    found = re.findall(r"sparse \(1/1 steps sparse\) \| targets kept (\d+)/(\d+)", trained["sparse"])
    assert len(found) == 1 and all(int(total) == multimodal.TARGETS_PER_STEP for _, total in found)
    assert all(0.5 <= int(kept) / int(total) < 0.8 for kept, total in found)  # rows of several lengths: some keep more
    assert f"megatron-core {checkout.version}" in trained["sparse"]
