"""What of benchmarks/gpu can be checked without a GPU: counts, reports, and the code of every part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.gpu import machine, packages, report
from benchmarks.gpu.work import Work, conv
from regate_megatron.errors import ReGateError
from tests.launch import ROOT


def test_setup_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "IMPORTS", ("import json", "import no_such_package"))
    options = SimpleNamespace(
        out=tmp_path, part="setup", only=None, budget_seconds=600, cpu_rehearsal=True, commit=None
    )
    assert packages.run(options) == 1
    found = json.loads((tmp_path / "setup.json").read_text())["measurements"]
    assert [(one["name"], one["holds"]) for one in found[:2]] == [
        ("import json", True),
        ("import no_such_package", False),
    ]
    assert "No module named 'no_such_package'" in capsys.readouterr().out


def test_work_counts_each_matrix_and_each_key_a_query_reads():
    work = Work(rows=3, num_layers=4, weights_per_layer=1000, attention_width=16, head_weights=500)
    length, short = 256, 128
    read = [position + 1 for position in range(length)]  # two products, two operations each, three passes
    exact = 3 * 3 * sum(2 * 1000 + 4 * 16 * keys for keys in read)
    assert work.layer(length) == pytest.approx(exact, rel=2 / length)
    assert work.decoder(length, short, 1) == work.layer(length) + 3 * work.layer(short)
    assert work.step(length, short, 0) - work.decoder(length, short, 0) == 3 * 3 * 2 * short * 500


def test_conv_is_one_where_time_follows_work():
    assert conv(0.6, 1.0, 60.0, 100.0) == pytest.approx(1)
    assert conv(0.8, 1.0, 60.0, 100.0) == pytest.approx(0.5)


def _rehearsed(folder):
    about = {"rehearsal": True, "torch": "2.11"}
    results = {"part": "parity", "machine": about, "measurements": [], "skipped": [{"name": "a", "reason": "no GPU"}]}
    (folder / "parity.json").write_text(json.dumps(results))


def test_results_of_a_rehearsal_stay_out_of_the_documentation(tmp_path, capsys):
    _rehearsed(tmp_path)
    page = report.PAGE.read_text()
    with pytest.raises(ReGateError, match="results of a rehearsal: parity"):
        report.run(SimpleNamespace(out=tmp_path, cpu_rehearsal=False))
    assert report.run(SimpleNamespace(out=tmp_path, cpu_rehearsal=True)) == 0
    assert "skipped: a (no GPU)" in capsys.readouterr().out
    assert report.PAGE.read_text() == page
    assert "new figures" in report.with_results(page, "new figures")


def test_without_a_gpu_a_part_stops_in_one_line(tmp_path):
    run = _part("parity", "--out", str(tmp_path))
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 1 and lines[-1].startswith("regate: benchmarks/gpu/run.py parity: given torch sees no GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.parametrize(
    "part, only",
    [
        ("setup", ""),
        ("parity", "n1"),
        ("parity", "keep1-gpt-fp32"),
        ("step_time", ""),
        ("fp8", "e"),
        ("graphs", ""),
        ("learning", ""),
    ],
)
def test_every_part_runs_in_small_on_a_cpu(tmp_path, part, only):
    """What holds there holds exactly; figures of time mean nothing and are judged nowhere."""
    seconds = "20" if part == "learning" else "300"  # the experiment takes an hour and is ended
    run = _part(part, "--cpu-rehearsal", "--only", only, "--out", str(tmp_path), "--budget-seconds", seconds)
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert [one["name"] for one in results["measurements"] if one["holds"] is False] == [], run.stderr[-3000:]
    assert results["machine"]["rehearsal"] and results["machine"]["source_sha256"] == machine.source_digest()
    assert results["measurements"] or part == "learning"


def _part(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
