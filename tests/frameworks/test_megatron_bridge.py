"""Megatron-Bridge's own loop trains with ReGATE switched on by one callback; CPU, a local layer spec, one rank."""

import importlib.util
import json

import pytest

from tests.launch import ROOT, succeed


def missing() -> str:
    """Why Megatron-Bridge cannot be imported here; empty where it can."""
    for name in ("transformer_engine", "megatron.bridge", "modelopt", "nvidia_resiliency_ext"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed (docs/megatron_bridge.md says what Megatron-Bridge needs)"
    return ""


pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three trainings of six steps: without us, keeping every target, and eliding."""
    folder, found = tmp_path_factory.mktemp("bridge"), {}
    for case in ("plain", "all kept", "regate"):
        results = folder / f"{case}.json"
        run = succeed(1, [str(ROOT / "tests/frameworks/run_bridge.py"), case, str(results)])
        found[case] = dict(json.loads(results.read_text()), output=run.output, trace=folder / case / "dp00000.jsonl")
    return found


def test_without_regate_nothing_is_wrapped(runs):
    assert runs["plain"]["steps"] == [] and runs["plain"]["loop restored"]


def test_keep_ratio_1_trains_bit_for_bit_as_without(runs):
    assert runs["all kept"]["losses"] == runs["plain"]["losses"]
    assert runs["all kept"]["totals"]["targets_kept"] == runs["all kept"]["totals"]["targets_total"]


def test_every_step_counts_once_and_sparse_steps_follow_the_warm_up(runs):
    assert runs["regate"]["steps"] == [
        ["warmup", 1, 0],
        ["warmup", 2, 0],
        ["sparse", 3, 1],
        ["sparse", 4, 2],
        ["sparse", 5, 3],
        ["sparse", 6, 4],
    ]
    assert runs["regate"]["losses"][:2] == runs["plain"]["losses"][:2]
    assert runs["regate"]["losses"][3:] != runs["plain"]["losses"][3:]


def test_last_layer_runs_short_in_sparse_steps_only_and_evaluation_runs_long(runs):
    trained = [length for training, with_gradient, length in runs["regate"]["lengths"] if training and with_gradient]
    assert trained[:4] == [24] * 4 and set(trained[4:]) == {16}  # 8 of prompt and half of the 16 answer tokens
    evaluated = [length for training, _, length in runs["regate"]["lengths"] if not training]
    assert evaluated and set(evaluated) == {24} and runs["regate"]["evaluations"] > 0


def test_half_of_the_targets_are_kept_and_every_microbatch_is_traced(runs):
    totals = runs["regate"]["totals"]
    assert (totals["targets_total"], totals["targets_kept"]) == (6 * 4 * 16, 2 * 4 * 16 + 4 * 4 * 8)
    records = [json.loads(line) for line in runs["regate"]["trace"].read_text().splitlines()]
    assert [record["iteration"] for record in records] == [step for step in range(1, 7) for _ in range(2)]


def test_it_says_so_when_attached_and_at_every_log_interval(runs):
    lines = [line for line in runs["regate"]["output"].splitlines() if "[regate]" in line]
    assert "attached to GPTModel" in lines[0]
    assert [line.split("iteration ")[1].split(" ")[0] for line in lines[1:]] == ["2", "4", "6"]
    assert "targets kept 64/128 (50.0%)" in lines[-1]


def test_model_and_loop_are_left_as_they_were(runs):
    assert runs["regate"]["loop restored"] and not runs["regate"]["attached at the end"]
