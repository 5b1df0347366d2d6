"""tools/extract_teacher.py: a tiny LLaVA checkpoint written by Megatron goes in, a GPT checkpoint comes out."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from tests.launch import succeed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOL = ROOT / "tools" / "extract_teacher.py"
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


def _run_megatron(command, folder):
    return succeed(1, [HERE / "run_extract_teacher.py", command, folder]).output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with llava/ and weights.pt."""
    folder = tmp_path_factory.mktemp("extract")
    _run_megatron("save", folder)
    return folder


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("extract_teacher", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher(folder, tool):
    assert tool.main(["--source", str(folder / "llava"), "--target", str(folder / "teacher")]) == 0
    return folder / "teacher"


def _tensors(path):
    """Every tensor of a checkpoint by name, read by torch alone."""
    entries = checkpoint.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(str(path)), no_dist=True)
    return state


def _refusal(tool, capsys, source, target, *more):
    capsys.readouterr()
    assert tool.main(["--source", str(source), "--target", str(target), *more]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("regate: ")
    assert all(word in lines[0] for word in ("given", "allowed", "change"))
    return lines[0]


def test_every_tensor_is_equal_bit_for_bit_and_nothing_else_comes_along(folder, teacher):
    source, found = _tensors(folder / "llava"), _tensors(teacher / "release")
    prefix = "language_model."
    want = {name[len(prefix) :]: value for name, value in source.items() if name.startswith(prefix)}
    assert found.keys() == want.keys() and len(want) >= 8
    assert len(want) < len(source), "the source has a vision tower"
    for name, value in want.items():
        assert found[name].dtype == value.dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name
    data = sum(file.stat().st_size for file in (teacher / "release").glob("*.distcp"))
    assert data < sum(file.stat().st_size for file in (folder / "llava").glob("*.distcp"))


def test_megatron_loads_the_copy_as_a_teacher_and_as_a_plain_gpt(folder, teacher):
    assert "tensors are equal" in _run_megatron("load", folder)


def test_runs_as_a_program_without_megatron_or_torchrun(folder, tmp_path):
    run = "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    arguments = [str(TOOL), "--source", str(folder / "llava"), "--target", str(tmp_path / "new"), "--dry-run"]
    command = [sys.executable, "-c", f"import sys, runpy; sys.modules['megatron'] = None; {run}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert "bfloat16" in result.stdout and "dry run" in result.stdout
    assert not (tmp_path / "new").exists()


def test_overwrite_replaces_a_checkpoint_and_only_a_checkpoint(folder, tool, capsys, tmp_path):
    target = tmp_path / "teacher"
    options = ["--source", str(folder / "llava"), "--target", str(target)]
    assert tool.main(options) == 0
    (target / "release" / "stale").touch()
    assert "--overwrite" in _refusal(tool, capsys, folder / "llava", target)
    assert (target / "release" / "stale").exists()
    assert tool.main([*options, "--overwrite"]) == 0
    assert not (target / "release" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"], "nothing is left aside"
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").touch()
    assert "no checkpoint" in _refusal(tool, capsys, folder / "llava", photos, "--overwrite")
    assert (photos / "one.jpg").exists()


def test_refuses_a_missing_source(tool, capsys, tmp_path):
    assert "no folder" in _refusal(tool, capsys, tmp_path / "absent", tmp_path / "new")


def test_refuses_the_legacy_format(tool, capsys, tmp_path):
    (tmp_path / "old" / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "old" / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt").touch()
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("2")
    assert "--ckpt-format torch_dist" in _refusal(tool, capsys, tmp_path / "old", tmp_path / "new")


def test_refuses_a_checkpoint_without_language_model(tool, capsys, tmp_path):
    checkpoint.save({"vision_model.conv1.weight": torch.zeros(2)}, checkpoint_id=str(tmp_path / "vit"), no_dist=True)
    (tmp_path / "vit" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert "no language model" in _refusal(tool, capsys, tmp_path / "vit", tmp_path / "new")


def test_refuses_a_language_model_that_needs_no_extraction(tool, capsys, teacher, tmp_path):
    assert "as it is" in _refusal(tool, capsys, teacher, tmp_path / "new")


def test_refuses_a_target_that_cannot_be_written(folder, tool, capsys, tmp_path):
    (tmp_path / "file").touch()
    _refusal(tool, capsys, folder / "llava", tmp_path / "file" / "new")
    _refusal(tool, capsys, folder / "llava", folder / "llava" / "inside")


def test_refuses_a_source_that_ends_early_and_leaves_nothing(folder, tool, capsys, tmp_path):
    shutil.copytree(folder / "llava", tmp_path / "cut")
    for file in (tmp_path / "cut").glob("*.distcp"):
        os.truncate(file, 1000)
    assert "cannot be read" in _refusal(tool, capsys, tmp_path / "cut", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
