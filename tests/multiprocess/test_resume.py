"""A run that was interrupted is the run that was not: checkpoints, other layouts, damage, plain Megatron."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.many import Many, many
from tests.multiprocess.test_training import MODEL, REGATE, SCRIPT, _weights

SAMPLES = {"TEST_SAMPLES": "48"}  # six steps to an epoch: steps 6 to 9 meet samples again, 3 to 5 lean on the prior
STEPS, HALF = 10, 5
FORMATS = {
    "sync": [],
    "async": ["--async-save", "--async-strategy", "mcore"],
    "legacy": ["--ckpt-format", "torch"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with many(tmp_path_factory.mktemp("logs")) as server:
        yield server


def _train(runs: Many, num_ranks: int, folder: Path, *flags: object, teacher: bool = True, **options):
    """10 steps that save every 5th into ``folder`` and trace into ``folder``/trace."""
    argv = [SCRIPT, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, "--save", folder, "--save-interval", HALF]
    argv += [*REGATE, "--regate-trace", folder / "trace", "--ckpt-assume-constant-structure"]
    argv += ["--regate-teacher-load", "student"] if teacher else ["--regate-score", "student"]
    return runs.run(num_ranks, [*argv, *flags], **{"env": SAMPLES, **options})


def _resume(runs: Many, num_ranks: int, source: Path, folder: Path, *flags: object, **options):
    """Steps 6 to 10, from the checkpoint of step 5."""
    return _train(runs, num_ranks, folder, "--load", source, "--ckpt-step", HALF, *flags, **options)


def _trace(folder: Path, after: int = 0) -> dict[str, list[dict]]:
    """The records of each rank, of iterations above ``after``."""
    files = sorted((folder / "trace").glob("*.jsonl"))
    records = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: [one for one in lines if one["iteration"] > after] for name, lines in records.items()}


def _kept(folder: Path, after: int = 0) -> dict:
    """Kept positions by iteration and sample."""
    records = [one for lines in _trace(folder, after).values() for one in lines]
    return {(one["iteration"], row["sample_key"]): row["kept"] for one in records for row in one["rows"]}


def _losses(output: str) -> dict[int, float]:
    """By iteration; without the second of a run, for which Megatron prints its mean with the first."""
    found = {int(step): float(loss) for step, loss in re.findall(r"iteration +(\d+)/.*?lm loss: (\S+) ", output)}
    found.pop(min(found) + 1)
    return found


def _state(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}" / "regate"


def _same_state(ours: Path, theirs: Path) -> bool:
    names = sorted(path.name for path in ours.iterdir())
    return names == sorted(path.name for path in theirs.iterdir()) and all(
        (ours / name).read_bytes() == (theirs / name).read_bytes() for name in names if name != "state.json"
    )


def _all_weights(folder: Path, iteration: int, kind: str) -> dict[str, torch.Tensor]:
    if kind != "legacy":
        return _weights(folder, iteration)
    files = sorted((folder / f"iter_{iteration:07d}").rglob("model_optim_rng.pt"))
    states = [torch.load(file, weights_only=False, map_location="cpu") for file in files]
    return {f"{n}.{name}": value for n, one in enumerate(states) for name, value in one["model"].items()}


@pytest.fixture(scope="module", params=FORMATS)
def uninterrupted(request, runs, tmp_path_factory):
    """10 steps at DP2, in one of the formats."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, _train(runs, 2, folder, *FORMATS[request.param])


def test_n_and_n_steps_are_2n_steps_bit_for_bit(runs, uninterrupted, tmp_path):
    """Losses, plans, scores, weights, optimizer and all that was learned."""
    kind, folder, whole = uninterrupted
    rest = _resume(runs, 2, folder, tmp_path, *FORMATS[kind])
    assert "resumed at iteration 5: difficulty of 896 targets in 28 samples restored" in rest.output
    assert _losses(rest.output).items() <= _losses(whole.output).items()
    assert _trace(tmp_path) == _trace(folder, HALF)
    assert [one["phase"] for one in _trace(tmp_path)["dp00000.jsonl"]][::2] == ["sparse", "dense", *["sparse"] * 3]
    assert _same_state(_state(tmp_path, STEPS), _state(folder, STEPS))
    ours, theirs = _all_weights(tmp_path, STEPS, kind), _all_weights(folder, STEPS, kind)
    assert ours.keys() == theirs.keys() and not [name for name in ours if "regate" in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if torch.is_tensor(ours[name]))
    assert not list(folder.glob("regate_incomplete*"))


def test_dealt_rows_run_once_in_their_step_and_n_and_n_steps_are_2n(runs, tmp_path):
    """The loader and its state know nothing of it: the samples of every step are those of a run without dealing."""
    home, dealt, rest = (tmp_path / name for name in ("home", "dealt", "rest"))
    more = {"env": SAMPLES | {"TEST_PROMPTS": "1"}, "teacher": False}
    _train(runs, 2, home, "--regate-budget", "per-sample", **more)
    _train(runs, 2, dealt, "--regate-budget", "dealt", **more)
    _resume(runs, 2, dealt, rest, "--regate-budget", "dealt", **more)
    assert _trace(rest) == _trace(dealt, HALF)
    assert _same_state(_state(rest, STEPS), _state(dealt, STEPS))
    assert [one[:2] for one in _seen(dealt)] == [one[:2] for one in _seen(home)]
    moved = {one[0] for one, other in zip(_seen(dealt), _seen(home), strict=True) if one != other}
    sparse = {one["iteration"] for one in _trace(dealt)["dp00000.jsonl"] if one["phase"] == "sparse"}
    assert moved and moved <= sparse


def test_n_and_n_steps_are_2n_by_kind_by_one_threshold_and_on_a_scattered_schedule(runs, tmp_path):
    """Rows are dealt by what the threshold keeps of them, and the teacher has run before they travel."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    flags = ["--regate-budget", "dealt", "--regate-share", "batch", "--regate-dense-at", "random"]
    flags += ["--regate-score", "product", "--regate-difficulty", "kind", "--regate-dense-steps", "2"]
    flags += ["--regate-cycle-steps", "4"]
    more = {"env": SAMPLES | {"TEST_PROMPTS": "1"}}
    _train(runs, 2, whole, *flags, **more)
    _resume(runs, 2, whole, rest, *flags, **more)
    records = [one for lines in _trace(whole).values() for one in lines]
    phases = {one["iteration"]: one["phase"] for one in records}
    assert [phases[step] for step in range(3, 7)].count("dense") == 2
    assert _trace(rest) == _trace(whole, HALF) and _same_state(_state(rest, STEPS), _state(whole, STEPS))
    for step in (step for step, phase in phases.items() if phase == "sparse"):
        rows = [row for one in records if one["iteration"] == step for row in one["rows"]]
        kept, targets = (sum(row[name] for row in rows) for name in ("num_kept_targets", "num_targets"))
        assert kept == -(-targets // 2)
        assert len({row["num_kept_targets"] / row["num_targets"] for row in rows if row["num_targets"]}) > 1
        kept_scores, left = [], []
        for row in rows:
            best = sorted(row["scores"].values(), reverse=True)
            floor = -(-row["num_targets"] // 4)
            kept_scores += best[floor : row["num_kept_targets"]]
            left += best[row["num_kept_targets"] :]
        assert min(kept_scores) >= max(left)  # one threshold over both ranks, floors aside


def _seen(folder: Path) -> list[tuple[int, str, str]]:
    """Every row that ran, as (iteration, sample, rank)."""
    records = [(name, one) for name, lines in _trace(folder).items() for one in lines]
    return sorted((one["iteration"], row["sample_key"], name) for name, one in records for row in one["rows"])


def _without_teacher(source: Path, folder: Path, *also: str) -> Path:
    """A copy of the checkpoints, as somebody makes it who does not know of the folder beside them."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("iter_0000010", "trace", "regate_teacher", *also))
    return folder


def _refusal(run) -> str:
    lines = [line for line in run.output.splitlines() if line.startswith("regate: ")]
    assert len(lines) == 1 and set(run.codes) == {1}, run.output[-3000:]
    assert all(word in lines[0] for word in ("--regate-teacher-load student: given", "allowed", "change"))
    return lines[0]


def test_lost_teacher_is_refused_and_never_the_student_as_it_is_now(runs, uninterrupted, tmp_path):
    kind, folder, _ = uninterrupted
    source = _without_teacher(folder, tmp_path / "source")
    line = _refusal(_resume(runs, 2, source, tmp_path / "ours", *FORMATS[kind], ok=False))
    if kind == "legacy":  # its arguments are not read: what was learned says who the teacher was
        assert "goes on with another teacher than it had (weights" in line
    else:
        assert f"of a run with a teacher, without {source / 'regate_teacher'}" in line
    if kind == "sync":  # nor with the difficulty reset: that says nothing of the teacher
        also = [*FORMATS[kind], "--regate-reset-difficulty"]
        _refusal(_resume(runs, 2, source, tmp_path / "ours", *also, ok=False))


@pytest.mark.parametrize("uninterrupted", ["sync"], indirect=True)
def test_teacher_of_another_time_is_refused_and_one_that_is_named_is_said(runs, uninterrupted, tmp_path):
    kind, folder, _ = uninterrupted
    source = _without_teacher(folder, tmp_path / "source")
    shutil.copytree(folder / "iter_0000010", source / "regate_teacher")
    line = _refusal(_resume(runs, 2, source, tmp_path / "ours", ok=False))
    assert "goes on with another teacher than it had (weights" in line
    named = source / "regate_teacher"
    run = _resume(runs, 2, source, tmp_path / "ours", "--regate-teacher-load", named)
    assert re.search("restored; the teacher is another one than before: weights [0-9a-f]{32}, here", run.output)


@pytest.fixture(scope="module")
def saved(runs, tmp_path_factory):
    """The checkpoint of 10 steps at DP2 and what was said."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, _train(runs, 2, folder, teacher=False)


def _continues(runs, saved, folder: Path, num_ranks: int, *flags: object) -> None:
    source, whole = saved
    rest = _resume(runs, num_ranks, source, folder, *flags, teacher=False)
    assert _kept(folder) == _kept(source, HALF)
    expected = _losses(whole.output)
    for step, loss in _losses(rest.output).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def test_one_rank_continues_what_two_began(runs, saved, tmp_path):
    _continues(runs, saved, tmp_path, 1)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp4", "tp2-pp2"])
def test_another_layout_continues_what_two_began(runs, saved, tmp_path, layout):
    flags = [f"--tensor-model-parallel-size={2 if 'tp2' in layout else 1}"]
    flags += [f"--pipeline-model-parallel-size={2 if 'pp2' in layout else 1}"]
    _continues(runs, saved, tmp_path, 2 if layout in ("tp2", "pp2") else 4, *flags)


@pytest.mark.full
def test_two_ranks_then_four_then_one_keep_what_one_layout_keeps(runs, saved, tmp_path):
    source, whole = saved
    save = ["--save-interval", "2"]
    middle, last = tmp_path / "four", tmp_path / "one"
    _train(runs, 4, middle, "--load", source, "--ckpt-step", HALF, *save, teacher=False)
    rest = _train(runs, 1, last, "--load", middle, "--ckpt-step", "8", teacher=False)
    assert _kept(middle) == _kept(source, HALF) and _kept(last) == _kept(source, 8)
    expected = _losses(whole.output)
    for step, loss in _losses(rest.output).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def _plain(runs: Many, num_ranks: int, *flags: object):
    argv = [SCRIPT, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, *flags]
    return runs.run(num_ranks, argv, env=SAMPLES, plain=True)


@pytest.mark.parametrize(
    "strictness", ["assume_ok_unexpected", pytest.param("raise_unexpected", marks=pytest.mark.full)]
)
def test_plain_megatron_loads_our_checkpoint(runs, saved, strictness):
    run = _plain(runs, 1, "--load", saved[0], "--ckpt-step", HALF, "--dist-ckpt-strictness", strictness)
    assert min(_losses(run.output)) == HALF + 1
    assert "successfully loaded checkpoint" in run.output and "[regate]" not in run.output


@pytest.mark.full
def test_plain_megatron_loads_our_legacy_checkpoint(runs, tmp_path):
    _train(runs, 1, tmp_path, *FORMATS["legacy"], teacher=False)
    run = _plain(runs, 1, "--load", tmp_path, "--ckpt-step", HALF, *FORMATS["legacy"])
    assert min(_losses(run.output)) == HALF + 1 and "[regate]" not in run.output


def test_we_load_a_plain_checkpoint_and_say_that_difficulty_starts_empty(runs, tmp_path):
    _plain(runs, 1, "--save", tmp_path, "--save-interval", HALF)
    run = _resume(runs, 1, tmp_path, tmp_path / "ours", teacher=False)
    assert "resumed at iteration 5: difficulty starts empty (the checkpoint holds none); dense steps come first" in (
        run.output
    )
    phases = [one["phase"] for one in _trace(tmp_path / "ours")["dp00000.jsonl"]][::4]
    assert phases == ["dense", "dense", "sparse", "sparse", "sparse"]


def _damage(source: Path, folder: Path, name: str, how: str) -> None:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("iter_0000010", "trace"))
    path = _state(folder, HALF) / name
    if path.is_dir():
        shutil.rmtree(path)
        return
    whole = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole[:-7] if how == "truncated" else whole)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("difficulty-00001.records", "flipped"),
        pytest.param("difficulty-00000.records", "truncated", marks=pytest.mark.full),
        pytest.param("prior.table", "missing", marks=pytest.mark.full),
        pytest.param("state.json", "flipped", marks=pytest.mark.full),
        ("", "missing"),
    ],
)
def test_damaged_state_is_refused_in_one_line(runs, saved, tmp_path, name, how):
    source = tmp_path / "damaged"
    _damage(saved[0], source, name, how)
    run = _resume(runs, 2, source, tmp_path, teacher=False, ok=False)
    lines = [line for line in run.output.splitlines() if line.startswith("regate: ")]
    assert len(lines) == 1 and run.codes == [1, 1]
    damaged = _state(source, HALF) / name if name else f"{_state(source, HALF).parent} of a run with --regate"
    for word in (f"saved difficulty: given {damaged}", "allowed", "change", "--regate-reset-difficulty"):
        assert word in lines[0]
    if not name:
        run = _resume(runs, 1, source, tmp_path, "--regate-reset-difficulty", teacher=False)
        assert "difficulty starts empty (--regate-reset-difficulty); dense steps come first" in run.output
