"""Clusters' launch lines of NVIDIA's scripts, and the recipes', pass the dry run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.scripts.checkouts import LIMIT_S, flags_of, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())
LLAMA = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
 --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 256
 --train-samples 1000000 --lr 3e-4 --lr-decay-style cosine --lr-warmup-samples 1000 --bf16 --swiglu
 --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
 --tokenizer-type HuggingFaceTokenizer --tokenizer-model no/such-model --data-path 0.3 /no/a 0.7 /no/b --split 99,1,0
 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer
 --overlap-grad-reduce --overlap-param-gather --recompute-granularity full --recompute-method uniform
 --recompute-num-layers 1 --save /no/folder --load /no/folder --save-interval 500 --eval-interval 1000 --eval-iters 10
 --tensorboard-dir /no/folder --attention-dropout 0 --hidden-dropout 0 --regate --regate-teacher-load /no/teacher
 --regate-trace /no/trace""".split()

WRITE_DATA = """
import sys
sys.dont_write_bytecode = True
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
builder = IndexedDatasetBuilder(sys.argv[1] + ".bin")
for start in range(200):
    builder.add_document(torch.arange(start % 20, start % 20 + 90), [90])
builder.finalize(sys.argv[1] + ".idx")
"""


def _tried(command: list[str], **variables: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the recipes say `python`
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.rstrip().endswith("[dry run] ok") and "2 sparse steps" in run.stdout
    return run.stdout


def test_a_cluster_line_passes_a_dry_run(checkout):
    line = ["torchrun", "--nnodes", "4", "--nproc-per-node", "8", "-m", "regate_megatron"]
    script = checkout.script("pretrain_gpt.py")
    said = _tried([sys.executable, "-m", "regate_megatron", "dry-run", *line, script, *LLAMA])
    assert (
        "TP2 PP2 DP8" in said and "num-layers 32 -> 2" in said and "an evaluation, a sparse step, a checkpoint" in said
    )


@pytest.mark.parametrize(
    ("recipe", "precision"), [("llava_8b.sh", "bf16"), ("llava_8b.sh", "fp8"), ("slurm.sbatch", "bf16")]
)
def test_a_recipe_passes_its_dry_run(checkout, recipe, precision):
    sizes = {"TP": "2", "PP": "2"} if recipe == "slurm.sbatch" else {}
    layout = "TP2 PP2" if sizes else "TP4 PP1"
    said = _tried(
        ["bash", f"examples/recipes/{recipe}"],
        MEGATRON=str(checkout.path),
        DRY_RUN="1",
        PRECISION=precision,
        **{"CACHE": "", **sizes},
    )
    assert "ReGATE on LLaVAModel" in said and f"{layout} DP1 on gloo ranks" in said
    assert ("FP8 to the precision beside it" in said) == (precision == "fp8")


def test_what_has_buffers_of_one_size_is_taken_out_and_told(checkout):
    """pretrain_vlm.py has an option of its own for its language model's overlap; Megatron's parser knows none such."""
    sizes = "--tensor-model-parallel-size 2 --no-rope-fusion".split()
    flags = "--decoder-tp-comm-overlap --cuda-graph-impl local --regate --regate-score student --train-iters 9".split()
    command = [sys.executable, "-m", "regate_megatron", "dry-run", "--nproc", "2", checkout.script("pretrain_vlm.py")]
    said = _tried([*command, *flags_of("pretrain_vlm.py", "one"), *sizes, *flags])
    assert "--decoder-tp-comm-overlap" in said and "taken out" in said
    assert "tp_comm_overlap: on in dense steps" in said and "CUDA graphs: on in dense steps" in said


def test_nothing_is_written_beside_the_data_or_into_the_checkout(checkout, tmp_path):
    """Index files go to the run's temporary folder, also where the line names another; progress has its folder."""
    data, cache = tmp_path / "data", tmp_path / "indices"
    data.mkdir()
    subprocess.run(
        [sys.executable, "-c", WRITE_DATA, str(data / "text_document")],
        env={**os.environ, "PYTHONPATH": str(checkout.path)},
        check=True,
        timeout=LIMIT_S,
    )
    before = {folder: _files(folder) for folder in (data, checkout.path)}
    flags = [*flags_of("pretrain_gpt.py", "one"), "--regate", "--regate-score", "student", "--log-progress"]
    flags += ["--no-rope-fusion"]  # the fused kernel takes one row
    flags = [flag for flag in flags if flag != "--mock-data"]
    flags += ["--data-path", str(data / "text_document"), "--data-cache-path", str(cache), "--save", "/no/folder"]
    command = [sys.executable, "-m", "regate_megatron", "dry-run", "--nproc", "1", checkout.script("pretrain_gpt.py")]
    said = _tried([*command, *flags, "--save-interval", "5", "--train-iters", "9"])
    assert "mock data" not in said and not cache.exists()
    assert {folder: _files(folder) for folder in before} == before


def _files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
