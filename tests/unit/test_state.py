"""Saved state takes values, no session: what a planner learned and how far the run is, on one rank."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from regate_megatron.config import ReGateConfig
from regate_megatron.errors import ReGateError
from regate_megatron.memory.learned import Learned
from regate_megatron.memory.state import Progress, SavedState, StateSave, has_state, read_state
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.state import _summary, lacks_what_it_scores_by

ALONE = Topology(0, 1, True, 0, 1, None, None, None)
BESIDE = Topology(0, 1, False, 0, 1, None, None, None)  # a rank that is no planner, and alone here
KEYS_N2, LABELS_X = torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 6, 7])
LOSSES = [torch.tensor([4.0, 2.0]), torch.tensor([0.5])]
COUNT_N = torch.tensor([len(loss_T) for loss_T in LOSSES])
GRADIENT = {"visual_score": "gradient", "visual_keep_ratio": 0.5}
PROGRESS = Progress(step=7, dense_until=9, learns=True, settings={"seed": 3}, totals={"steps": 7}, teacher={"a": [1]})


def _learned() -> Learned:
    return Learned(0.9, ALONE, 1e9)


def _saved(folder):
    learned = _learned()
    learned.take_in(KEYS_N2, COUNT_N, torch.cat(LOSSES), LABELS_X, step=6, is_dense=True)
    save = StateSave(learned, PROGRESS, ALONE, folder / "aside")
    learned.take_in(KEYS_N2, COUNT_N, 2 * torch.cat(LOSSES), LABELS_X, step=7, is_dense=True)
    return save


def _look_up(learned: Learned) -> list[float]:
    return learned.look_up(KEYS_N2, torch.tensor([2, 1]), LABELS_X, step=8)[0].tolist()


@pytest.mark.parametrize("in_background", [False, True])
def test_what_was_known_when_the_save_began_comes_back(tmp_path, in_background):
    save = _saved(tmp_path)
    save.write(in_background=in_background)
    save.finish()
    assert not has_state(tmp_path / "regate", ALONE)
    save.publish(tmp_path / "regate")
    assert has_state(tmp_path / "regate", ALONE) and not (tmp_path / "aside").exists()
    found, learned = read_state(tmp_path / "regate", ALONE, _learned()), _learned()
    assert (found.progress, found.num_samples, found.num_targets) == (PROGRESS, 2, 3)
    learned.adopt(found.records, found.prior)
    assert _look_up(learned) == [4.0, 2.0, 0.5]
    assert learned.prior.look_up(torch.tensor([5, 6, 7, 8])).tolist() == [4.0, 2.0, 0.5, pytest.approx(6.5 / 3)]


@pytest.mark.parametrize(
    ("before", "now", "lacks"),
    [
        ({}, {}, False),
        ({"score": "regate"}, {"score": "student", "ema_decay": 0.5}, False),
        ({"score": "regate"}, {"score": "regate", "difficulty": "kind"}, True),
        ({"score": "random"}, {"score": "student"}, True),
        ({"score": "random"} | GRADIENT, {"score": "student"} | GRADIENT, True),  # gradients alone were learned
        ({"score": "student"}, {"score": "student"} | GRADIENT, True),
        ({"score": "student"} | GRADIENT, {"score": "random"} | GRADIENT, False),
        ({"score": "random"}, {"score": "reference"}, False),
    ],
)
def test_a_resumed_run_begins_dense_where_it_scores_by_what_the_run_before_did_not_learn(before, now, lacks):
    old = ReGateConfig(**before)
    settings = {name: getattr(old, name) for name in ("difficulty", "visual_score")}
    progress = dataclasses.replace(PROGRESS, learns=old.learns_losses, settings=settings)
    assert lacks_what_it_scores_by(progress, ReGateConfig(**now)) is lacks


@pytest.mark.parametrize(
    ("before", "now", "held", "says"),
    [
        ({}, {}, 0, "schedule and totals restored (the score keeps nothing of samples)"),
        ({"score": "regate"}, {"score": "regate"}, 2, "difficulty of 3 targets in 2 samples restored"),
        ({"score": "regate"}, {}, 2, "difficulty of 3 targets in 2 samples restored; settings changed: score regate -> "
                                     "reference"),
        (GRADIENT, GRADIENT, 2, "3 averages of losses and gradients in 2 records restored"),
    ],
)  # fmt: skip
def test_a_resumed_run_says_what_came_back(before, now, held, says):
    settings = {name: before.get(name, getattr(ReGateConfig(), name)) for name in ("score", "visual_score")}
    saved = SavedState(dataclasses.replace(PROGRESS, settings=settings), held, 3 if held else 0)
    assert _summary(saved, ReGateConfig(**now)) == says


def test_a_rank_that_is_no_planner_learns_how_far_the_run_was_and_reads_no_records(tmp_path):
    save = _saved(tmp_path)
    save.write()
    save.finish()
    (tmp_path / "aside" / "difficulty-00000.records").unlink()
    found = read_state(tmp_path / "aside", BESIDE, None)
    assert (found.progress, found.records, found.prior) == (PROGRESS, None, None)
    with pytest.raises(ReGateError, match=r"^regate: saved difficulty: given .*difficulty-00000.records with no file"):
        read_state(tmp_path / "aside", ALONE, _learned())


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("difficulty-00000.records", lambda whole: whole[:-9], "bytes of"),
        ("difficulty-00000.records", lambda whole: whole[:-1] + b"x", "a wrong checksum"),
        ("difficulty-00000.records", None, "no file to read"),
        ("prior.table", lambda whole: whole[:-1] + b"x", "a wrong checksum"),
        ("state.json", lambda whole: whole[:-9], "unreadable content"),
        ("state.json", lambda whole: whole.replace(b'"step": 7', b'"step": 8'), "a wrong checksum"),
        ("state.json", lambda _: b'{"step": 7, "version": 1}', "of format 1; allowed format 3; change to the version"),
    ],
)
def test_damaged_or_older_state_is_refused_in_one_line_that_says_how_to_go_on(tmp_path, name, damage, words):
    save = _saved(tmp_path)
    save.write()
    save.finish()
    path = tmp_path / "aside" / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(ReGateError, match=r"^regate: saved difficulty: given .*; allowed .*; change ") as refusal:
        read_state(tmp_path / "aside", ALONE, _learned())
    assert words in str(refusal.value) and f"{name} " in str(refusal.value) and "\n" not in str(refusal.value)
    assert "--regate-reset-difficulty" in str(refusal.value)


def test_a_file_of_another_save_is_refused_though_it_is_whole(tmp_path):
    learned = _learned()
    learned.take_in(KEYS_N2, COUNT_N, 3 * torch.cat(LOSSES), LABELS_X, step=6, is_dense=True)
    for save in (_saved(tmp_path / "one"), StateSave(learned, PROGRESS, ALONE, tmp_path / "third")):
        save.write()
        save.finish()
    for file in ("difficulty-00000.records", "prior.table"):
        folder = tmp_path / file
        shutil.copytree(tmp_path / "one" / "aside", folder)
        shutil.copy(tmp_path / "third" / file, folder / file)
        with pytest.raises(ReGateError, match=f"{file} with the content of another save"):
            read_state(folder, ALONE, _learned())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_part_that_cannot_be_written_is_refused_and_leaves_no_manifest(tmp_path, in_background):
    save = _saved(tmp_path)
    shutil.rmtree(tmp_path / "aside")
    save.write(in_background=in_background)
    with pytest.raises(ReGateError, match=r"^regate: saving difficulty: given FileNotFoundError.*change --save"):
        save.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_when_the_save_begins(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ReGateError, match="^regate: saving difficulty: given"):
        _saved(tmp_path / "file")
