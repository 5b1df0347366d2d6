"""Benchmarks count what they say: balance on a few ranks, medians, work
by formula, pages filled from results. That the ways compared do the same work is in tests/test_benchmarked_ways.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import balance, dealt, report, run
from benchmarks.measuring import figure, median_interval, spread
from benchmarks.models import Size
from benchmarks.work import head_work, layer_work


@pytest.mark.parametrize("rows", [1, 2])
def test_the_report_of_balance_on_a_few_ranks(tmp_path, rows):
    lines = []
    mixes = ["--mixes", "captions", "mixed-instruct", "packed-instruct", "--micro-batch-size", str(rows)]
    options = ["--ranks", "4", "--rank-steps", "8", "--rows", "4", "--out", str(tmp_path / "balance.json")]
    results = balance.main([*mixes, *options], lines.append)
    saved = json.loads((tmp_path / "balance.json").read_text())["results"]
    for name, by_ranks in results.items():
        found = by_ranks[4]
        assert saved[name]["4"] == found
        bound = max(1.02, found["balanced"]["achievable"] * 1.001)
        assert 1 <= found["balanced"]["max/mean"] <= bound
        assert found["per-sample"]["kept"] == pytest.approx(0.5, abs=0.02)  # shares round up
        assert 0.25 <= min(found["uniform"]["kept"], found["balanced"]["kept"])
        assert found["dealt"]["kept"] == found["per-sample"]["kept"]
        assert found["dealt"]["slowest"] <= found["dealt, shared experts"]["slowest"] <= found["per-sample"]["slowest"]
        assert found["dealt, shared experts"]["each"] <= min(found["dealt"]["each"], found["per-sample"]["each"])
        if rows == 1:
            assert found["dealt, shared experts"]["each"] == pytest.approx(found["dealt"]["at best"])
        assert found["dealt"]["achievable"] <= found["dealt"]["max/mean"]
        assert ("dense-dealt" in found) == (name == "captions") and ("dealt-rows" in found) == (rows > 1)
        assert name in lines[0]
    assert results["mixed-instruct"][4]["uniform"]["max/mean"] == 1


def test_ranks_are_balanced_where_visual_positions_are_left_out_too(tmp_path):
    mixes = ["--mixes", "documents", "video", "--visual-keep-ratio", "0.25"]  # by targets alone documents are not
    options = ["--ranks", "8", "--rank-steps", "16", "--rows", "4", "--out", str(tmp_path / "balance.json")]
    for by_ranks in balance.main([*mixes, *options], lambda _: None).values():
        assert by_ranks[8]["balanced"]["max/mean"] <= 1.02
        assert by_ranks[8]["per-sample"]["kept"] == pytest.approx(0.27, abs=0.06)
        assert by_ranks[8]["uniform"]["slowest"] < 0.6


def test_work_of_a_layer_is_linear_in_the_mlp_and_quadratic_in_attention():
    linear, square = 3 * 2 * 100, 3 * 4 * 8  # forward and backward; 100 weights, hidden 8
    assert layer_work(rows=2, positions=10, hidden=8, weights=100) == 2 * (10 * linear + 10**2 * square)
    assert layer_work(rows=1, positions=20, hidden=8, weights=0) == 4 * layer_work(1, 10, 8, 0)
    assert head_work(Size(rows=1, hidden=4, vocab=5), positions=7) == 3 * 2 * 7 * 4 * 5


def test_figures_are_medians_with_quartiles_and_an_interval_that_holds_them():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["median"], found["rounds"]) == (3.0, 5)
    assert found["quartiles"] == [1.5, 4.5]
    assert found["interval"] == [1.0, 5.0]  # five values leave 6 % outside all of them
    assert spread([2.0])["quartiles"] == [2.0, 2.0]


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low <= np.log(2) <= high for low, high in (median_interval(rng.exponential(size=25)) for _ in range(2000))
    ]
    assert 0.94 <= np.mean(covered) <= 0.99


def _step_row() -> dict:
    shares = {"decoder_time_share": 0.58, "conv": 1.02, "speedup": 1.7, "planning_share": 0.003}
    measured = {name: spread([value] * 3) for name, value in shares.items()}
    setting = {"model": "GPT", "rows": 2, "length": 512, "keep_ratio": 0.5, "dense_layers": 1}
    return {**setting, **measured, "decoder_work_share": 0.59}


def test_results_tell_of_rows_that_are_dealt_beside_the_others(tmp_path):
    keys = {"slowest_share": 0.4, "max_mean": 1.01, "uniform_slowest_share": 0.8}
    part = {"part": "dealt", "figures": [], "dealt": keys, "machine": {}, "seconds": 1.0, "quick": False}
    (tmp_path / "dealt.json").write_text(json.dumps(part))
    assert "dealt" in run.PARTS and run.collect(tmp_path)["dealt"] == keys


def test_a_budget_s_figures_are_those_of_the_slowest_rank_beside_the_dense_step_of_the_same_round():
    def arm(cpu: list, work: list, positions: list) -> dict:
        return {"cpu": cpu, "work": work, "positions": positions, "planning": [0.01, 0.02], "moving": [0.0, 0.004]}

    dense = arm([2.0, 1.0], [10.0, 10.0], [8, 8])
    budgets = {name: arm([0.5, 1.0], [3.0, 5.0], [3, 5]) for name in dealt.BUDGETS}
    measured = {"rounds": [{"dense": dense, **budgets}] * 3, "messages": dict.fromkeys(dealt.BUDGETS, 7)}
    first, *rows = dealt._rows("DP4", measured)
    assert first["budget"] == "dense" and first["step_s"]["median"] == 2.0
    for row in rows:
        found = {name: value["median"] for name, value in row.items() if isinstance(value, dict)}
        assert found == {
            "step_s": 1.0, "slowest_share": 0.5, "work_share": 0.5, "conv": 1.0, "max_mean": 1.25,
            "planning_share": 0.02, "moving_share": 0.004,
        }  # fmt: skip
        assert dealt._figures(row)[1]["goal"] == ">= 0.9"
    results = _results()
    results["parts"].append({"part": "dealt", "figures": [], "rows": [first, *rows]})
    lines = report.fragments(results)["bench-dealt"].splitlines()
    assert lines[2] == "| DP4 | `uniform` | 50.0% (50.0% to 50.0%) | 50.0% | 1.00 | 1.250 | 2.0% | 0.4% | 7 |"
    assert len(lines) == 2 + 3


def _results() -> dict:
    machine = {
        "cpu": "CPU", "cores": 2, "precision": "float32", "python": "3.12", "torch": "2", "megatron_core": "0.19",
        "regate_megatron": "0.1.0",
    }  # fmt: skip
    parts = [
        {
            "part": "step_time",
            "figures": [
                figure("GPT, keep 0.5", "conv", spread([0.9, 1.0, 1.1]), goal=">= 0.95", beside="work 59 %"),
                figure("control", "time ratio", 1.5),
            ],
            "rows": [_step_row()],
        },
        {"part": "memory", "figures": [figure("ours", "of dense", 0.625, "percent")]},
    ]
    headline = {"conv": 1.0, "planning_share": 0.002, "speedup": 1.7, "kept_share": 0.5}
    setting = {"model": "GPT", "length": 512, "keep_ratio": 0.5, "dense_layers": 1}
    return {
        "headline": headline,
        "headline_setting": setting,
        "headline_interval": {"conv": [0.9, 1.1]},
        "machine": machine,
        "seconds": 600.0,
        "parts": parts,
    }


def test_one_table_has_a_row_per_figure_with_its_median_and_quartiles():
    lines = report.markdown_table(_results()["parts"]).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2] == "| step time | GPT, keep 0.5 | conv | 1.000 (0.900 to 1.100) | 3 | >= 0.95 | work 59 % |"
    assert lines[3].startswith("|  | control | time ratio | 1.500 |")
    assert "62.50%" in lines[4]


def _visual_part() -> dict:
    shares = {"decoder_time_share": 0.2, "conv": 1.0, "speedup": 3.5, "cycle_speedup": 2.7}
    measured = {name: spread([value] * 3) for name, value in shares.items()}
    setting = {"rows": "video-like", "length": 2240, "keep_ratio": 0.5, "visual_keep_ratio": 0.2}
    row = {**setting, **measured, "decoder_work_share": 0.21, "saved_share": 0.3}
    row |= {"tower_work_share_sparse": 0.25, "tower_work_share_sparse_frozen": 0.1}
    planning = [
        {"visual_score": name, "keep_ratio": ratio, "ms": spread([30.0])}
        for name, ratio in (("even", 1), ("random", 0.5))
    ]
    visual = {"speedup": 3.5, "conv": 1.0, "kept_visual": 0.21}
    return {"part": "visual", "figures": [], "rows": [row], "planning": planning, "visual": visual}


def test_the_page_on_visual_positions_is_filled_from_its_part():
    results = _results()
    results["parts"].append(_visual_part())
    texts = report.fragments(results)
    row = "| video-like, 2240 | 0.5 | 0.2 | 21.0% | 20.0% | 1.00 | 3.50 times as fast (3.50 to 3.50) |"
    assert texts["bench-visual"].splitlines()[2] == row + " 2.70 | 25% (10%) | 30% |"
    assert texts["bench-visual-planning"].splitlines()[::2] == ["| even | random beside targets |", "| 30 | 30 |"]


def test_results_tell_the_visual_headline_beside_the_other(tmp_path):
    step_time = _results()["parts"][0] | {"headline": {"conv": 1.0}}
    for part in (step_time, _visual_part()):
        part |= {"machine": {}, "seconds": 1.0, "quick": False}
        (tmp_path / f"{part['part']}.json").write_text(json.dumps(part))
    found = run.collect(tmp_path)
    assert found["visual"] == {"speedup": 3.5, "conv": 1.0, "kept_visual": 0.21} and found["headline"] == {"conv": 1.0}


def test_only_what_stands_between_markers_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench-table -->\nold\n<!-- /bench-table -->\nafter\n")
    texts = report.fragments(_results())
    assert report.write_between_markers(page, texts) == ["bench-table"]
    once = page.read_text()
    assert (
        once.startswith("before\n<!-- bench-table -->\n| part |") and once.endswith("\nafter\n") and "old" not in once
    )
    report.write_between_markers(page, texts)
    assert page.read_text() == once
    row = "| GPT | 2 x 512 | 0.5 | 1 | 59.0% | 58.0% | 1.02 (1.02 to 1.02) | 1.70 times as fast | 0.30% |"
    assert texts["bench-steps"].splitlines()[2] == row
    assert "conv 1.000** (95 % interval 0.900 to 1.100)" in texts["bench-headline"]
    assert "A sparse step, without teacher and optimizer: **1.70 times as fast**." in texts["bench-headline"]


def test_the_benchmark_of_planning_runs_what_a_planner_has():
    from benchmarks import planning

    records = planning.Records(1e9)
    key_N2 = planning.fill(records, 8, 4)
    assert len(records) == 8 and key_N2.shape == (8, 2)
    stages = {name for name, found in planning._whole_step(2, 64, 2).items() if isinstance(found, dict)}
    assert stages == {"all", "read", "score", "select", "plan", "lay out", "learn", "exchange"}
