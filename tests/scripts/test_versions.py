"""NVIDIA's own, unmodified scripts through the launcher: every version named, dense and sparse."""

from __future__ import annotations

import pytest

from tests.scripts.checkouts import LAYOUTS, REGATE, launch, losses, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())
STUDENT = [*REGATE, "--regate-teacher-load", "student"]
SPARSE = {
    "pretrain_gpt.py": "sparse (1/1 steps sparse) | targets kept 256/512 (50.0%) | positions run 256/512 (50.0%)",
    "pretrain_vlm.py": "sparse (1/1 steps sparse) | targets kept 128/256 (50.0%) | positions run 264/392 (67.3%)",
}
_plain: dict = {}


def _plain_losses(checkout, script: str, layout: str) -> list[float]:
    if (checkout, script, layout) not in _plain:
        run = launch(checkout, script, layout)
        assert "validation loss at iteration 4" in run.output and "regate" not in run.output
        _plain[checkout, script, layout] = losses(run.output)
    return _plain[checkout, script, layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", ["pretrain_gpt.py", "pretrain_vlm.py", "pretrain_hybrid.py"])
def test_plain_training_runs_under_the_emulation(checkout, script, layout):
    plain = _plain_losses(checkout, script, layout)
    assert len(plain) == 4 and plain[-1] < plain[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", list(SPARSE))
def test_regate_elides_half_and_leaves_dense_steps_alone(checkout, script, layout, tmp_path):
    run = launch(checkout, script, layout, *STUDENT, "--regate-trace", str(tmp_path))
    trained, plain = losses(run.output), _plain_losses(checkout, script, layout)
    assert trained[:2] == plain[:2]  # warm-up and dense: the digits of plain Megatron
    assert trained[2:] != plain[2:] and len(trained) == 4
    assert run.output.count(SPARSE[script]) == 2
    assert "validation loss at iteration 4" in run.output
    assert "regate_keep_ratio ..." in run.output  # the argument dump knows our flags
    assert f"megatron-core {checkout.version}" in run.output  # the checkout's, not the installed wheel's
    assert (tmp_path / "dp00000.jsonl").stat().st_size > 0


def test_a_hybrid_model_trains_sparsely_or_is_refused_in_one_line(checkout, record_property):
    run = launch(checkout, "pretrain_hybrid.py", "one", *STUDENT, fails=True)
    if run.returncode:
        said = [line for line in run.errors.splitlines() if line.startswith("regate: ")]
        assert len(said) == 1 and "given" in said[0] and "allowed" in said[0] and "change" in said[0]
        assert not losses(run.output)
        record_property("outcome", "refused")
    else:
        assert "sparse (1/1 steps sparse) | targets kept 256/512 (50.0%)" in run.output


def test_help_prints_megatrons_flags_and_ours(checkout):
    run = launch(checkout, "pretrain_gpt.py", "one", "--help")
    assert "--tensor-model-parallel-size" in run.output
    assert "--regate-keep-ratio REGATE_KEEP_RATIO" in run.output and "(default: 0.5)" in run.output
