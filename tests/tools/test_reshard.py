"""tools/reshard.py: every rank of Megatron finds its own weights in the legacy format, and nothing changes on the way
back; what is not known to be exact is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil

import pytest
import torch

from regate_megatron.checkpoints.torch_dist import TorchDistReader
from tests.launch import succeed
from tests.tools.helpers import assert_same_bits, refusal, run, tool, write_model
from tests.tools.test_convert_hf_teacher import printed_flags

MODELS = {
    "llama": ("llama", {"num_hidden_layers": 4}),
    "qwen2-tied": ("qwen2", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
}
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2)}


@pytest.fixture(scope="module")
def reshard():
    return tool("reshard")


def to_torch(reshard, source, target, layout, *more):
    sizes = ["--tensor-model-parallel-size", layout[0], "--pipeline-model-parallel-size", layout[1]]
    run(reshard, "--source", source, "--target", target, "--format", "torch", *sizes, *more)
    return target


def stored(folder):
    reader = TorchDistReader(folder)
    return {name: reader.read(name) for name in reader.shapes}


@pytest.fixture(scope="module")
def root(reshard, tmp_path_factory):
    """MODEL/dist, resharded to MODEL/LAYOUT and checked by Megatron there, which saved MODEL/LAYOUT-megatron itself."""
    root = tmp_path_factory.mktemp("reshard")
    cases = []
    for name, (kind, options) in MODELS.items():
        hf = write_model(kind, root / name / "hf", **options)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run(tool("convert_hf_teacher"), "--source", hf, "--target", root / name / "dist")
        flags = printed_flags(output.getvalue())
        for layout, sizes in LAYOUTS.items():
            # Megatron's local layers, which run on a CPU, keep their norms apart
            to_torch(reshard, root / name / "dist", root / name / layout, sizes, "--transformer-impl", "local")
            folders = {"legacy": str(root / name / layout), "save_legacy": str(root / name / f"{layout}-megatron")}
            sizes = {"tp": sizes[0], "pp": sizes[1]}
            cases.append({"hf": str(hf), "megatron": str(root / name / "dist"), "flags": flags, **sizes, **folders})
    (root / "cases.json").write_text(json.dumps(cases))
    succeed(2, ["tests/tools/run_convert.py", root / "cases.json", root / "results.json"])
    for name in MODELS:
        for layout in LAYOUTS:
            (root / name / f"{layout}-megatron" / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def test_every_rank_of_megatron_finds_its_own_weights(root):
    results = json.loads((root / "results.json").read_text())  # the ranks compared bit for bit
    assert len(results) == len(MODELS) * len(LAYOUTS)


@pytest.mark.parametrize("writer", ["", "-megatron"], ids=["ours", "megatrons"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_to_torch_dist_keeps_every_bit(reshard, root, tmp_path, name, layout, writer):
    back = ["--format", "torch_dist", "--transformer-impl", "transformer_engine"]
    run(reshard, "--source", root / name / f"{layout}{writer}", "--target", tmp_path / "back", *back)
    assert_same_bits(stored(tmp_path / "back"), stored(root / name / "dist"))


@pytest.mark.parametrize("name", MODELS)
def test_from_one_legacy_layout_to_another(reshard, root, tmp_path, name):
    to_torch(reshard, root / name / "tp2-megatron", tmp_path / "pp2", (1, 2))
    files = sorted((root / name / "pp2").rglob("*.pt"))
    assert len(files) == 2
    for file in files:
        found = torch.load(tmp_path / "pp2" / file.relative_to(root / name / "pp2"), weights_only=False)["model"]
        assert_same_bits(found, torch.load(file, weights_only=False)["model"])


def test_a_llava_keeps_every_bit_there_and_back(reshard, tmp_path):
    succeed(1, ["tests/tools/run_extract_teacher.py", "save", tmp_path])
    to_torch(reshard, tmp_path / "llava", tmp_path / "legacy", (2, 2))
    names = {
        path.parent.name: set(torch.load(path, weights_only=False)["model"])
        for path in (tmp_path / "legacy").rglob("*.pt")
    }
    assert set(names) == {"mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"}
    assert any(name.startswith("vision_model.") for name in names["mp_rank_01_000"])
    assert not any(name.startswith("vision_model.") for name in names["mp_rank_01_001"])
    run(reshard, "--source", tmp_path / "legacy", "--target", tmp_path / "back", "--format", "torch_dist")
    assert_same_bits(stored(tmp_path / "back"), stored(tmp_path / "llava"))


def test_dry_run_writes_nothing(reshard, root, tmp_path):
    to_torch(reshard, root / "llama" / "dist", tmp_path / "new", (2, 2), "--dry-run")
    assert not list(tmp_path.iterdir())


def test_refuses_what_does_not_divide_or_needs_nothing(reshard, root, tmp_path, capsys):
    options = ["--source", root / "llama" / "dist", "--target", tmp_path / "new", "--format"]
    assert "as it is" in refusal(reshard, capsys, *options, "torch_dist")
    assert "3 for 4 layers" in refusal(reshard, capsys, *options, "torch", "--pipeline-model-parallel-size", 3)
    assert "--tensor-model" in refusal(reshard, capsys, *options, "torch", "--tensor-model-parallel-size", 5)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metadata.json").touch()
    assert "--overwrite" in refusal(reshard, capsys, *options, "torch")


def test_refuses_a_rank_that_is_missing_damaged_or_would_run_something(reshard, root, tmp_path, capsys):
    source = shutil.copytree(root / "llama" / "tp2", tmp_path / "source")
    options = ["--source", source, "--target", tmp_path / "new", "--format", "torch_dist"]
    file = source / "release" / "mp_rank_00" / "model_optim_rng.pt"
    last = (source / "release" / "mp_rank_01").rename(tmp_path / "aside")
    assert "tensor_model_parallel_size 1, saved with 2" in refusal(reshard, capsys, *options)
    last.rename(source / "release" / "mp_rank_01")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(reshard, capsys, *options)

    torch.save({"model": {}, "args": _Runs(tmp_path / "made")}, file)
    line = refusal(reshard, capsys, *options)
    assert "would import posix.mkdir" in line and "--ckpt-format torch_dist" in line
    assert not (tmp_path / "made").exists()
    torch.save({"model0": {}, "model1": {}}, file)
    assert "virtual pipeline" in refusal(reshard, capsys, *options)
    torch.save({"model": {"decoder.layers.0.mlp.experts.linear_fc9.weight": torch.zeros(2)}}, file)
    shutil.rmtree(source / "release" / "mp_rank_01")
    assert "linear_fc9" in refusal(reshard, capsys, *options)
    shutil.rmtree(source / "release" / "mp_rank_00")
    shutil.copytree(root / "llama" / "tp2" / "release" / "mp_rank_01", source / "release" / "mp_rank_01")
    assert "lacks mp_rank_00" in refusal(reshard, capsys, *options)
    assert not (tmp_path / "new").exists()


class _Runs:
    """What an attacker would put into a checkpoint."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
