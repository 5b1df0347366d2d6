"""What the checkpoint tools leave alone, clear away or refuse at their target: other people's folders, what a
killed run left, a run that is still writing, a full disk."""

from __future__ import annotations

import fcntl
import resource

import pytest

from tests.tools.helpers import refusal, run, tool, write_model


@pytest.fixture(scope="module")
def convert():
    return tool("convert_hf_teacher")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model("llama", tmp_path_factory.mktemp("hf") / "llama", hidden_size=256, intermediate_size=512)


@pytest.fixture
def options(model, tmp_path):
    return ["--source", model, "--target", tmp_path / "new"]


def test_folders_beside_the_target_with_the_names_of_our_steps_are_left_alone(convert, options, tmp_path, capsys):
    for name in ("new.old", "new.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    assert "not of these tools" in refusal(convert, capsys, *options)
    (tmp_path / "new.incomplete").rename(tmp_path / "elsewhere")
    for more in ((), ("--overwrite",)):
        run(convert, *options, *more)
    assert (tmp_path / "new.old" / "mine").exists() and (tmp_path / "elsewhere" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "new", "new.old"]


def test_what_a_killed_run_left_is_cleared(convert, options, tmp_path):
    (tmp_path / "new.incomplete" / "release").mkdir(parents=True)
    (tmp_path / "new.incomplete" / ".regate-incomplete").touch()
    (tmp_path / "new.incomplete" / "stale").touch()
    run(convert, *options)
    assert not list((tmp_path / "new").glob("stale")) and not list((tmp_path / "new").glob(".regate*"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_second_run_does_not_disturb_the_first(convert, options, tmp_path, capsys):
    (tmp_path / "new.incomplete").mkdir()
    mark = tmp_path / "new.incomplete" / ".regate-incomplete"
    with mark.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing" in refusal(convert, capsys, *options)
        assert mark.exists()
    run(convert, *options)


@pytest.mark.parametrize("way", ["to torch_dist", "to Hugging Face"])
def test_a_disk_that_is_full_is_said_in_one_line_and_nothing_is_left(convert, model, tmp_path, capsys, way):
    options = ["--source", model]
    if way != "to torch_dist":
        run(convert, *options, "--target", tmp_path / "megatron")
        options = ["--source", tmp_path / "megatron", "--to-hf"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        line = refusal(convert, capsys, *options, "--target", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith("regate: --target")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    "program, options",
    [
        ("convert_hf_teacher", ["--vocab-size", 5]),
        ("convert_hf_teacher", ["--to-hf", "--dtype", "bf16"]),
        ("convert_hf_teacher", ["--to-hf", "--tensor-model-parallel-size", 2]),
        ("extract_teacher", ["--to-hf", "--make-vocab-size-divisible-by", 2]),
    ],
)
def test_options_without_an_effect_are_refused(model, tmp_path, capsys, program, options):
    line = refusal(tool(program), capsys, "--source", model, "--target", tmp_path / "new", *options)
    assert line.startswith(f"regate: {options[-2]}: given {options[-1]} with")
