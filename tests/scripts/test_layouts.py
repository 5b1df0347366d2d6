"""NVIDIA's own, unmodified scripts train alike in every layout, from one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.checkouts import COMMON, REGATE, launch, losses, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())


@pytest.fixture(scope="module")
def starts() -> dict:
    return {}


@pytest.fixture
def start(server, checkout, starts, tmp_path_factory) -> Path:
    """One torch_dist checkpoint that every layout of pretrain_gpt.py starts from, and its teacher."""
    if checkout not in starts:
        starts[checkout] = tmp_path_factory.mktemp("start")
        save = ["--save", str(starts[checkout]), "--save-interval", "1", "--train-iters", "1"]
        launch(server, checkout, "pretrain_gpt.py", "one", *save)
    return starts[checkout]


@pytest.fixture(scope="module")
def runs() -> dict:
    return {}


def _gpt(server, checkout, runs: dict, start: Path, layout: str, dense_layers: int) -> str:
    if (checkout, layout, dense_layers) not in runs:
        flags = ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng", *REGATE]
        flags += ["--regate-teacher-load", str(start), "--regate-dense-layers", str(dense_layers)]
        runs[checkout, layout, dense_layers] = launch(server, checkout, "pretrain_gpt.py", layout, *flags).output
    return runs[checkout, layout, dense_layers]


@pytest.mark.parametrize(("layout", "dense_layers"), [("dp2", 1), ("tp2-pp2", 1), ("tp2-pp2", 0), ("tp2-pp2", 2)])
def test_pretrain_gpt_trains_alike_in_every_layout(server, checkout, runs, start, layout, dense_layers):
    run, alone = (_gpt(server, checkout, runs, start, where, dense_layers) for where in (layout, "one"))
    assert len(losses(run)) == 4
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert "validation loss at iteration 4" in run
    assert "sparse (1/1 steps sparse) | targets kept 256/512 (50.0%)" in run


def test_pretrain_vlm_takes_a_teacher_of_pretrain_gpt(server, checkout, tmp_path):
    """The two scripts' local specs name their norms differently; a torch_dist teacher serves both, in any layout."""
    flags = "--num-layers 4 --normalization LayerNorm --untie-embeddings-and-output-weights --train-iters 1".split()
    flags += ["--max-position-embeddings", "64", "--save-interval", "1", "--save", str(tmp_path)]
    server.run(1, [checkout.script("pretrain_gpt.py"), *COMMON, *flags])
    run = launch(server, checkout, "pretrain_vlm.py", "tp2-pp2", *REGATE, "--regate-teacher-load", str(tmp_path))
    assert len(losses(run.output)) == 4
    assert "sparse (1/1 steps sparse) | targets kept 128/256 (50.0%)" in run.output
