"""The teacher and the cache in Megatron's own training loop, and the tool that fills a cache before it."""

from __future__ import annotations

import json
import re

import pytest

from tests.launch import ROOT, ranks, succeed
from tests.multiprocess.test_training import MODEL, REGATE, SCRIPT, _losses, _train

TP2 = ["--tensor-model-parallel-size", "2"]
BUILT = "[regate] a reference loss is missing: the teacher is built now"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("teacher")
    _train(1, "--save", str(folder), "--save-interval", "2", iterations=2)
    return ["--regate-teacher-load", str(folder)]


def _precompute(*flags: str) -> tuple[str, int, int]:
    """What it printed, and how many samples the teacher computed and the cache had."""
    command = [str(ROOT / "tools/precompute_references.py"), "--cpu", str(SCRIPT), *MODEL, "--train-iters", "6"]
    output = succeed(2, [*command, *TP2, *REGATE, *flags]).output
    computed, found = re.search(r"precomputed: (\d+) samples by the teacher, (\d+) found", output).groups()
    return output, int(computed), int(found)


def test_precomputed_cache_trains_without_a_teacher(teacher, tmp_path):
    """Computed at TP2, used at DP2; stopped and started again in between."""
    cache = [*teacher, "--regate-reference-cache", str(tmp_path / "cache")]
    save = ["--save", str(tmp_path / "save"), "--save-interval", "6"]
    output, computed, _ = _precompute(*cache, *save)
    assert computed > 0 and not _losses(output) and "validation loss" not in output
    assert not (tmp_path / "save").exists(), "nothing was trained, so nothing is saved"
    (note,) = (tmp_path / "cache" / "progress").iterdir()
    assert json.loads(note.read_text()) == {"iteration": 6, "samples": 48}

    trained = _train(2, *REGATE, *cache)
    assert len(_losses(trained.output)) == 6 and "sparse (1/1 steps sparse)" in trained.output
    assert "built when the cache lacks a loss" in trained.output and BUILT not in trained.output

    note.write_text(json.dumps({"iteration": 4, "samples": 32}))  # as if stopped there
    for file in (tmp_path / "cache" / "losses").iterdir():
        file.unlink()
    output, again, found = _precompute(*cache, *save)
    assert "precomputing goes on at iteration 4" in output
    assert 0 < again <= 16 and again + found == 16 and again <= computed


def test_a_teacher_leaves_training_bit_for_bit_alone(teacher, tmp_path):
    """Dropout in the student, and a teacher that runs, is offloaded, and is written about in every step after the
    first: losses and gradient norms are those of plain Megatron. All targets are kept, so nothing else differs."""
    dropout = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1", *TP2]
    plain = _train(2, *dropout)
    flags = [
        "--regate",
        "--regate-score",
        "regate",
        "--regate-warmup-steps",
        "1",
        "--regate-dense-steps",
        "0",
        "--regate-keep-ratio",
        "0.999999",
    ]
    flags += [*teacher, "--regate-teacher-offload", "--regate-reference-cache", str(tmp_path / "cache")]
    ours = _train(2, *dropout, *flags)
    assert "sparse (1/1 steps sparse)" in ours.output
    assert list((tmp_path / "cache" / "losses").glob("dp00000-*.records"))
    assert len(_losses(plain.output)) == 6 and _losses(ours.output) == _losses(plain.output)


def test_resumed_run_of_a_student_teacher_uses_its_cache(tmp_path):
    """The teacher kept beside the checkpoints has the fingerprint of the student it was taken from."""
    flags = [*REGATE, "--regate-teacher-load", "student", "--regate-reference-cache", str(tmp_path / "cache")]
    flags += ["--save", str(tmp_path / "save"), "--save-interval", "4", "--override-opt-param-scheduler"]
    _train(2, *TP2, *flags, iterations=4)
    (manifest,) = (tmp_path / "cache").glob("manifest.json")
    before = manifest.read_text()
    resumed = _train(2, *TP2, *flags, "--load", str(tmp_path / "save"), iterations=6)
    assert len(_losses(resumed.output)) == 2 and manifest.read_text() == before
    fresh = _train(2, *TP2, "--seed", "9", *flags[:-5], ok=False)
    assert fresh.returncode and "made with teacher" in fresh.errors and "weights" in fresh.errors


def test_precomputing_without_a_directory_is_refused(teacher):
    run = ranks(1, [str(ROOT / "tools/precompute_references.py"), "--cpu", str(SCRIPT), *MODEL, *REGATE, *teacher])
    assert run.returncode and "regate: --regate-reference-cache: given no directory; allowed" in run.errors
