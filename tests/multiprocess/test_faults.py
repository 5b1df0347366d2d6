"""What goes wrong in long runs: replayed and skipped steps, NaN, slow ranks, kills in the midst of a save."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT
from tests.many import Many, many
from tests.multiprocess.test_resume import FORMATS, HALF, SAMPLES, STEPS, _same_state, _state, _trace
from tests.multiprocess.test_resume import _train as train
from tests.multiprocess.test_training import MODEL, REGATE, SCRIPT

FAULTS = ROOT / "tests/multiprocess/run_faults.py"
TRANSIENT = ["--rerun-mode", "validate_results", "--error-injection-type", "transient_error"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with many(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def calm(runs, tmp_path_factory):
    """10 steps at DP2 in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("calm")
    return folder, train(runs, 2, folder)


def _values(state: Path) -> np.ndarray:
    """All float16 values in a saved state."""
    parts = []
    for path in sorted(state.glob("difficulty-*.records")):
        with path.open("rb") as file:
            np.load(file, allow_pickle=False)
            parts.append(np.load(file, allow_pickle=False))
    return np.concatenate(parts)


def test_steps_that_run_twice_have_one_plan_and_teach_once(runs, calm, tmp_path):
    """A transient error is injected into every step: Megatron's rerun state machine runs them all again."""
    env = SAMPLES | {"TEST_VALIDATE": "warn"}
    run = train(runs, 2, tmp_path, *TRANSIENT, "--error-injection-rate", "1", env=env)
    assert run.output.count("Need to rerun step") == STEPS - 1  # it never validates the first
    assert _trace(tmp_path) == _trace(calm[0])
    assert _same_state(_state(tmp_path, STEPS), _state(calm[0], STEPS))


@pytest.mark.full
def test_a_run_ended_by_a_transient_error_continues_as_if_nothing_had_been(runs, calm, tmp_path):
    """The state machine leaves before the optimizer steps: the step is forgotten."""
    env = SAMPLES | {"TEST_VALIDATE": "fatal"}
    every = ["--save-interval", "1"]
    ended = train(runs, 2, tmp_path, *every, *TRANSIENT, "--error-injection-rate", "3", ok=False, env=env)
    done = len(_trace(tmp_path)["dp00000.jsonl"]) // 2
    assert "Possible transient error" in ended.output and 0 < done < STEPS
    train(runs, 2, tmp_path, *every, "--load", tmp_path, env=env)
    assert _trace(tmp_path) == _trace(calm[0])
    assert _same_state(_state(tmp_path, STEPS), _state(calm[0], STEPS))


def test_skipped_steps_teach_nothing(runs, tmp_path):
    """In fp16 a loss scale that is too high skips the first steps."""
    fp16 = ["--fp16", "--initial-loss-scale", "262144", "--hysteresis", "1", "--no-check-for-nan-in-loss-and-grad"]
    run = train(runs, 1, tmp_path, *fp16, "--save-interval", "2", teacher=False)
    counts = re.findall(r"iteration +(\d+)/.*?number of skipped iterations: +(\d+)", run.output)
    skipped = {int(step) for step, count in counts if int(count)}
    steps = {one["iteration"] for one in _trace(tmp_path)["dp00000.jsonl"]}
    assert {1, 2} <= skipped and steps == set(range(1, STEPS + 1)) - skipped and STEPS in steps
    assert len(_values(_state(tmp_path, 2))) == 0
    assert json.loads((_state(tmp_path, STEPS) / "state.json").read_text())["totals"]["steps"] == len(steps)


def test_nan_on_one_replica_makes_the_step_dense_on_all_and_leaves_the_store_finite(runs, tmp_path):
    argv = [FAULTS, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, "--save", tmp_path, *REGATE]
    argv += ["--save-interval", STEPS, "--regate-teacher-load", "student", "--regate-trace", tmp_path / "trace"]
    run = runs.run(2, argv, env=SAMPLES | {"TEST_FAULT": "nan"})
    for records in _trace(tmp_path).values():
        assert {one["iteration"] for one in records if one["fallback"]} == {5}
        assert all(one["kept_length"] == 32 for one in records if one["fallback"])
    assert run.output.count("| 1 steps ran dense (a score was not finite)") == 1
    values_N32 = _values(_state(tmp_path, STEPS)).reshape(-1, 32)  # every position is a target
    assert len(values_N32) and not np.isinf(values_N32).any()
    assert np.isnan(values_N32[:, [3, 7]]).all() and np.isfinite(values_N32[:, 8]).any()
    assert np.nanmax(values_N32[:, 11]) == np.finfo(np.float16).max  # a loss beyond what float16 holds


def test_a_planner_that_fails_ends_all_ranks_with_its_line(runs):
    """The others wait for it in the middle of an exchange."""
    argv = [FAULTS, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, *REGATE, "--regate-score", "student"]
    run = runs.run(2, argv, ok=False, env=SAMPLES | {"TEST_FAULT": "planner"})
    assert all(run.codes) and "Traceback" not in run.output
    said = [line for line in run.output.splitlines() if line.startswith("regate: ")]
    assert len(said) == 1 and "given IndexError: out of range; allowed" in said[0] and "change" in said[0]


def test_a_rank_killed_while_rows_are_exchanged_ends_the_other_with_a_line(runs):
    argv = [FAULTS, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, *REGATE, "--regate-score", "student"]
    env = SAMPLES | {"TEST_PROMPTS": "1", "TEST_FAULT": "killed"}
    begun = time.monotonic()
    run = runs.run(2, [*argv, "--regate-budget", "dealt"], ok=False, env=env, timeout_s=120)
    assert all(run.codes) and -9 in run.codes and time.monotonic() - begun < 100
    said = [line for line in run.output.splitlines() if line.startswith("regate: ")]
    assert len(said) == 1 and "no answer from another rank, which has stopped" in said[0], run.output[-3000:]


def test_a_slow_planner_delays_and_nothing_else(runs, calm, tmp_path):
    """It sleeps in its plans and in its part of an asynchronous save."""
    argv = [FAULTS, *MODEL, "--train-iters", STEPS, "--eval-interval", 100, "--save", tmp_path, *REGATE]
    argv += ["--save-interval", HALF, "--regate-teacher-load", "student", "--regate-trace", tmp_path / "trace"]
    runs.run(2, [*argv, *FORMATS["async"]], env=SAMPLES | {"TEST_FAULT": "slow"})
    assert _trace(tmp_path) == _trace(calm[0])
    assert _same_state(_state(tmp_path, STEPS), _state(calm[0], STEPS))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_killed_in_a_save_a_run_continues_from_the_last_complete_state(runs, tmp_path, kind):
    """Ten kills at random moments of a save, each followed by a restart: the state loaded is the one that was saved."""
    steps, random_moment = 120, random.Random(7)
    more = ["--train-iters", steps, "--save-interval", 2, *FORMATS[kind]]
    calm, ours = tmp_path / "calm", tmp_path / "ours"
    ours.mkdir()
    train(runs, 2, calm, *more, teacher=False)
    tracker, moments = ours / "latest_checkpointed_iteration.txt", []
    for _ in range(10):
        done = int(tracker.read_text()) if tracker.exists() else 0
        saves = [ours / f"regate_incomplete_{done + ahead:07d}" for ahead in (2, 4)]
        save = random_moment.choice([path for path in saves if not path.exists()])  # the last kill may have left one
        kill = [str(save), random_moment.uniform(0.0, 0.1 if kind == "sync" else 0.25)]
        run = train(runs, 2, ours, "--load", ours, *more, teacher=False, ok=None, kill=kill)
        assert -9 in run.codes, run.output[-3000:]
        now = int(tracker.read_text()) if tracker.exists() else 0
        moments.append((done, now, save.name))
        if done:
            assert f"resumed at iteration {done}: difficulty of" in run.output
        if now:
            assert _same_state(_state(ours, now), _state(calm, now)), moments
    print(moments)
    train(runs, 2, ours, "--load", ours, *more, teacher=False)
    assert _same_state(_state(ours, steps), _state(calm, steps))
    assert not list(ours.glob("regate_incomplete*"))


@pytest.mark.full
def test_two_thousand_steps_with_kills_and_evaluations(runs, tmp_path):
    """Memory stands still after the first 200 steps of a process, and evaluation is that of plain Megatron."""
    flags = [*MODEL, "--train-iters", 2000, "--eval-interval", 250, "--log-interval", 50, "--lr", "1e-3"]
    argv = [FAULTS, *flags, "--save", tmp_path, "--load", tmp_path, "--save-interval", 250, *REGATE]
    argv += ["--regate-score", "student", "--regate-warmup-steps", 20, "--regate-difficulty-memory", "1e-6"]
    env = SAMPLES | {"TEST_FAULT": "rss", "TEST_RSS": str(tmp_path / "rss")}
    for end in (500, 1250):
        kill = [str(tmp_path / f"regate_incomplete_{end:07d}"), 0.02]
        assert -9 in runs.run(2, argv, env=env, kill=kill, ok=None, timeout_s=600).codes
    runs.run(2, argv, env=env, timeout_s=600)
    drifts = []
    for rank in range(2):
        lines = [line.split() for line in (tmp_path / f"rss.{rank}").read_text().splitlines()]
        last = [(int(step), int(size)) for process, step, size in lines if process == lines[-1][0]]
        settled = [size for step, size in last if step >= last[0][0] + 200]
        assert len(settled) >= 8
        drifts.append(settled[-1] / settled[0] - 1)
    print("drift of resident memory over the last process, after 200 steps:", drifts)
    assert max(drifts) <= 0.01
    _evaluates_as_plain(runs, tmp_path, flags)


def _evaluates_as_plain(runs: Many, folder: Path, flags: list) -> None:
    once = [*flags, "--load", folder, "--ckpt-step", 1000, "--skip-train"]
    ours = runs.run(2, [SCRIPT, *once, *REGATE, "--regate-score", "student"], env=SAMPLES)
    plain = runs.run(2, [SCRIPT, *once], env=SAMPLES, plain=True)
    pattern = r"loss at iteration 1000.*?lm loss value: (\S+)"
    assert re.findall(pattern, ours.output) == re.findall(pattern, plain.output) != []
