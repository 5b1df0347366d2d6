"""NVIDIA's own, unmodified scripts of a Megatron-LM checkout, through the launcher, in every layout named.

MEGATRON_LM_DIR=<checkout of core_v0.19.0> make test PYTEST_ARGS=tests/scripts
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.launch import succeed

CHECKOUT = Path(os.environ.get("MEGATRON_LM_DIR", ""))
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pretrain_gpt.py").is_file(), reason="MEGATRON_LM_DIR names no checkout of Megatron-LM"
)

COMMON = """--num-layers 4 --hidden-size 64 --num-attention-heads 4 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3
 --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 16 --eval-iters 1
 --eval-interval 4 --log-interval 1 --split 90,5,5 --seq-length 64 --position-embedding-type rope --hidden-dropout 0
 --attention-dropout 0 --calculate-per-token-loss --num-workers 0""".split()
GPT = "--max-position-embeddings 64 --normalization RMSNorm --disable-bias-linear".split()
VLM = """--dataloader-seq-length 32 --max-position-embeddings 256 --img-h 32 --img-w 32 --patch-dim 8
 --ckpt-format torch --normalization LayerNorm""".split()
REGATE = "--regate --regate-warmup-steps 2 --regate-cycle-steps 4 --regate-dense-steps 1".split()
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "dp2": (2, []),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


def _run(script: str, layout: str, *flags: str, iterations: int = 6):
    num_ranks, sizes = LAYOUTS[layout]
    specific = GPT if script == "pretrain_gpt.py" else VLM
    command = ["-m", "regate_megatron", "--cpu", str(CHECKOUT / script), *COMMON, *specific, *sizes]
    return succeed(num_ranks, [*command, "--train-iters", str(iterations), *flags])


def _losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"iteration +\d+/.*?lm loss: (\S+)", output)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """One torch_dist checkpoint that every layout of pretrain_gpt.py starts from, and its teacher."""
    folder = tmp_path_factory.mktemp("start")
    _run("pretrain_gpt.py", "one", "--save", str(folder), "--save-interval", "1", iterations=1)
    return folder


@pytest.fixture(scope="module")
def gpt_runs(start) -> dict:
    return {}


def _gpt(gpt_runs: dict, start: Path, layout: str, dense_layers: int):
    if (layout, dense_layers) not in gpt_runs:
        flags = ["--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng", *REGATE]
        flags += ["--regate-teacher-load", str(start), "--regate-dense-layers", str(dense_layers)]
        gpt_runs[layout, dense_layers] = _run("pretrain_gpt.py", layout, *flags)
    return gpt_runs[layout, dense_layers]


@pytest.mark.parametrize(
    ("layout", "dense_layers"), [("tp2", 1), ("dp2", 1), ("pp2", 1), ("tp2-pp2", 1), ("tp2-pp2", 0), ("tp2-pp2", 2)]
)
def test_pretrain_gpt_trains_alike_in_every_layout(gpt_runs, start, layout, dense_layers):
    run, alone = _gpt(gpt_runs, start, layout, dense_layers), _gpt(gpt_runs, start, "one", dense_layers)
    assert len(_losses(run.output)) == 6
    assert _losses(run.output) == pytest.approx(_losses(alone.output), rel=1e-5)
    assert "validation loss at iteration 6" in run.output
    assert "sparse (1/1 steps sparse) | targets kept 256/512 (50.0%)" in run.output


def test_pretrain_vlm_takes_a_teacher_of_pretrain_gpt(tmp_path):
    """The two scripts' local specs name their norms differently; a torch_dist teacher serves both, in any layout."""
    flags = ["--normalization", "LayerNorm", "--untie-embeddings-and-output-weights"]
    command = ["-m", "regate_megatron", "--cpu", str(CHECKOUT / "pretrain_gpt.py"), *COMMON]
    succeed(
        1,
        [*command, *flags, *"--max-position-embeddings 64 --train-iters 1 --save-interval 1 --save".split(), tmp_path],
    )
    run = _run("pretrain_vlm.py", "tp2-pp2", *REGATE, "--regate-teacher-load", str(tmp_path))
    assert len(_losses(run.output)) == 6 and "sparse (1/1 steps sparse) | targets kept 128/256 (50.0%)" in run.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretrain_vlm_runs(layout, tmp_path):
    flags = ["--regate-teacher-load", "student", "--regate-trace", str(tmp_path)]
    run = _run("pretrain_vlm.py", layout, *REGATE, *flags)
    assert len(_losses(run.output)) == 6
    assert "regate_keep_ratio ..." in run.output  # the argument dump knows our flags
    assert "[regate] attached to LLaVAModel" in run.output
    assert "targets kept 128/256 (50.0%) | positions run 264/392 (67.3%)" in run.output
    assert "validation loss at iteration 6" in run.output
    assert (tmp_path / "dp00000.jsonl").stat().st_size > 0
