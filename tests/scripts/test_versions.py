"""NVIDIA's own, unmodified scripts through the launcher: every version named, dense and sparse."""

from __future__ import annotations

import pytest

from tests.scripts.checkouts import LAYOUTS, REGATE, command, launch, losses, parameters, torchrun

pytestmark = pytest.mark.parametrize("checkout", parameters())
STUDENT = [*REGATE, "--regate-teacher-load", "student"]
HALF_OF_TEXT = "sparse (1/1 steps sparse) | targets kept 256/512 (50.0%) | positions run 256/512 (50.0%)"
SPARSE = {
    "pretrain_gpt.py": HALF_OF_TEXT,
    "pretrain_vlm.py": "targets kept 128/256 (50.0%) | visual kept 136/136 (100.0%) | positions run 264/392 (67.3%)",
    "pretrain_hybrid.py": HALF_OF_TEXT,
}
_plain: dict = {}


def _plain_losses(server, checkout, script: str, layout: str) -> list[float]:
    if (checkout, script, layout) not in _plain:
        run = launch(server, checkout, script, layout)
        assert "validation loss at iteration 4" in run.output and "regate" not in run.output
        _plain[checkout, script, layout] = losses(run.output)
    return _plain[checkout, script, layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", list(SPARSE))
def test_plain_training_runs_under_the_emulation(server, checkout, script, layout):
    plain = _plain_losses(server, checkout, script, layout)
    assert len(plain) == 4 and plain[-1] < plain[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("script", list(SPARSE))
def test_regate_elides_half_and_leaves_dense_steps_alone(server, checkout, script, layout, tmp_path, record_property):
    flags = [*STUDENT, "--regate-trace", str(tmp_path)]
    if script == "pretrain_hybrid.py" and checkout.version.startswith("0.17."):  # before HybridModel
        refused = server.run(LAYOUTS[layout][0], command(checkout, script, layout, *flags), ok=False).output
        assert refused.count("regate: model: given MambaModel (") == 1 and "; change " in refused
        assert not losses(refused) and "Traceback" not in refused
        record_property("outcome", "refused")
        return
    run = launch(server, checkout, script, layout, *flags)
    trained, plain = losses(run.output), _plain_losses(server, checkout, script, layout)
    assert trained[:2] == plain[:2]  # warm-up and dense: the digits of plain Megatron
    assert trained[2:] != plain[2:] and len(trained) == 4
    assert run.output.count(SPARSE[script]) == 2
    assert "validation loss at iteration 4" in run.output
    assert "regate_keep_ratio ..." in run.output  # the argument dump knows our flags
    assert f"megatron-core {checkout.version}" in run.output  # the checkout's, not the installed wheel's
    assert (tmp_path / "dp00000.jsonl").stat().st_size > 0


def test_help_prints_megatrons_flags_and_ours(checkout):
    run = torchrun(checkout, "pretrain_gpt.py", "one", "--help")
    assert "--tensor-model-parallel-size" in run.output
    assert "--regate-keep-ratio P" in run.output and "(default: 0.5)" in run.output
