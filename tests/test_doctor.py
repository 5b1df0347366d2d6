"""``python -m regate_megatron doctor``: a report and an exit code, also where little is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from regate_megatron.support import RULES
from tests.launch import ROOT


def _doctor(*command: str, folder=ROOT, path: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))}
    return subprocess.run(
        [sys.executable, *(command or ("-m", "regate_megatron", "doctor"))],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_report_names_versions_and_every_rule_and_passes():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    run = _doctor()
    assert run.returncode == 0, run.stdout + run.stderr
    text = " ".join(run.stdout.split())
    assert "ok torch " in text and "ok megatron-core 0." in text and ", 0 failed" in text
    assert [rule.what for rule in RULES if f"{rule.what}: allowed {rule.allowed} ({rule.why})" not in text] == []


def test_without_torch_and_megatron_it_reports_instead_of_failing_to_import():
    run = _doctor("-S", "-m", "regate_megatron", "doctor")  # -S: no site-packages, nothing is installed
    assert run.returncode == 1
    assert "FAIL  no torch" in run.stdout and "FAIL  no megatron-core" in run.stdout and "FAIL  no xxhash" in run.stdout
    assert "sliding-window attention: allowed" in run.stdout
    assert run.stderr == ""


def test_the_unrelated_apex_of_pypi_is_a_failure_and_nvidias_is_not(tmp_path):
    impostor, real = tmp_path / "impostor", tmp_path / "real"
    for folder in (impostor / "apex", real / "apex" / "multi_tensor_apply"):
        folder.mkdir(parents=True)
    for folder in (impostor, real):
        (folder / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    run = _doctor(path=str(impostor))
    assert run.returncode == 1 and "FAIL  apex is PyPI's unrelated project" in run.stdout
    assert "ok    apex is NVIDIA's" in _doctor(path=str(real)).stdout


def test_a_script_of_that_name_is_run(tmp_path):
    (tmp_path / "doctor").write_text("print('a script')")
    run = _doctor(folder=tmp_path)
    assert run.returncode == 0 and run.stdout == "a script\n"
