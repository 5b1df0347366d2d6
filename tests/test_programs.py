"""The demo and the benchmark, as `make demo-quick` and `make bench` run them. Minutes each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.full


def _run(*command: str, timeout_s: int = 900) -> str:
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_quick_demo_leaves_its_files_and_counts_agree(tmp_path):
    output = _run("examples/demo/run.py", "--quick", "--out", str(tmp_path))
    assert "ReGATE" in output and "random" in output
    runs = {run["name"]: run for run in json.loads((tmp_path / "summary.json").read_text())["runs"]}
    assert set(runs) == {"dense", "regate", "random"}
    names = {
        "iterations",
        "targets_total",
        "targets_processed",
        "positions_dense",
        "positions_run",
        "eval_loss",
        "seconds",
    }
    assert all(names <= set(run) for run in runs.values())
    assert len({run["targets_total"] for run in runs.values()}) == 1  # the same samples
    assert runs["dense"]["targets_processed"] == runs["dense"]["targets_total"]
    assert runs["regate"]["targets_processed"] == runs["random"]["targets_processed"]
    sparse = [0, 0]
    for file in (tmp_path / "trace").glob("dp*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if record["phase"] == "sparse":
                sparse[0] += sum(row["num_kept_targets"] for row in record["rows"])
                sparse[1] += sum(row["num_targets"] for row in record["rows"])
    assert 0 < sparse[0] <= 0.7 * sparse[1]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("report.html", "kept_words.png"))


def test_benchmarks_leave_one_table_one_picture_and_their_headline(tmp_path):
    output = _run("benchmarks/run.py", "--quick", "--out", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["headline"]) == {"conv", "planning_share", "speedup", "kept_share"}
    assert results["headline"]["kept_share"] == pytest.approx(0.5, abs=0.02)
    assert set(results["visual"]) == {"speedup", "conv", "kept_visual"}
    assert len(results["parts"]) == 7 and all(part["part"].replace("_", " ") in output for part in results["parts"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    published = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--write-docs", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert published.returncode and "not to be published" in published.stderr
