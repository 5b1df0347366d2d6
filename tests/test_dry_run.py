"""The dry run: what it shrinks keeps every layout decision; a line that cannot train is one line of refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from regate_megatron.cpu.dry_run import command
from regate_megatron.cpu.dry_run.command import _reason
from regate_megatron.cpu.dry_run.line import LaunchLine, parse_line
from regate_megatron.cpu.dry_run.shrink import data_parallel_size, shrink
from regate_megatron.cpu.emulation import forked
from regate_megatron.cpu.emulation.forked import Ended
from regate_megatron.errors import ReGateError
from tests.launch import ROOT, Finished, program

SCRIPT = str(ROOT / "tests/multiprocess/run_pretrain.py")
MODEL = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
 --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 256
 --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --bf16
 --attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope --tokenizer-type HuggingFaceTokenizer
 --tokenizer-model no/such-model --data-path /no/such_text_document --train-samples 100000 --lr 3e-4
 --lr-warmup-samples 1000 --save=/no/such/folder --load /no/such/folder --sequence-parallel
 --use-distributed-optimizer""".split()
SIZES = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4".split()
)
REGATE = "--regate --regate-score student --regate-trace=/no/such/trace".split()
MOVING = """--regate-keep-ratio 1.0 --regate-keep-ratio-end=0.4 --regate-keep-ratio-steps 50000
 --regate-dense-from 90000 --regate-dense-last-layers 2""".split()


def cluster(**changes) -> Namespace:
    """Megatron's namespace of a line, as far as shrinking looks at it."""
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    parallel = {"expert_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "world_size": 8}
    model = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 16384, "num_attention_heads": 32}
    heads = {"num_query_groups": 8, "group_query_attention": True, "kv_channels": 128, "multi_latent_attention": False}
    data = {"seq_length": 8192, "sequence_parallel": False, "micro_batch_size": 1, "global_batch_size": 256}
    return Namespace(**{**sizes, **parallel, **model, **heads, **data, **changes})


def small(dense_layers: int = 1, **changes) -> dict:
    """What shrinking makes of :func:`cluster`."""
    return shrink(cluster(**changes), replicas=1, dense_layers=dense_layers, is_multimodal=False, fp8_multiple=1).values


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 2, 8, 32])
def test_heads_and_groups_still_divide(tensor, groups):
    made = small(tensor_model_parallel_size=tensor, num_query_groups=groups, world_size=16)
    heads, few = made["--num-attention-heads"], made["--num-query-groups"]
    assert heads % tensor == 0 and heads % few == 0 and made["--hidden-size"] % heads == 0
    assert (few % tensor == 0) == (groups % tensor == 0)  # groups shared among tensor ranks stay shared
    assert (heads == few) == (groups == 32)  # grouped attention stays grouped
    assert heads <= 32


@pytest.mark.parametrize(("stages", "virtual"), [(1, None), (2, None), (4, None), (2, 4), (4, 2)])
@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_dense_layers_stay_inside_or_outside_the_first_chunk(stages, virtual, dense_layers):
    sizes = {"pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": virtual}
    layers = small(dense_layers, **sizes)["--num-layers"]
    chunks = stages * (virtual or 1)
    assert layers % chunks == 0 and dense_layers < layers <= 16
    assert dense_layers <= layers // chunks


def test_too_many_dense_layers_stay_too_many():
    """A line to be refused must not be shrunk into one that passes."""
    sizes = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 4}  # two layers per chunk
    assert small(3, **sizes)["--num-layers"] // 16 == 2


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 9, 64])
def test_microbatches_keep_their_remainder_of_the_stages(stages, count):
    made = small(pipeline_model_parallel_size=stages, world_size=stages, global_batch_size=count)
    few = made["--global-batch-size"] // made["--micro-batch-size"]
    assert few % stages == count % stages and few <= count and (few >= stages) == (count >= stages)


def test_expert_parallelism_sets_the_least_number_of_replicas():
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "world_size": 32}
    assert data_parallel_size(cluster(**sizes, expert_tensor_parallel_size=1), limit=100) == 2
    assert data_parallel_size(cluster(**sizes, expert_tensor_parallel_size=2), limit=100) == 4
    assert data_parallel_size(cluster(**sizes, expert_tensor_parallel_size=2), limit=4) is None


def test_small_layouts_run_two_replicas_and_large_ones_the_fewest():
    replicas = {tensor: data_parallel_size(cluster(tensor_model_parallel_size=tensor), limit=8) for tensor in (1, 2, 4)}
    assert replicas == {1: 2, 2: 2, 4: 1}
    assert data_parallel_size(cluster(), limit=1) == 1


def test_too_little_memory_is_refused_before_a_rank_starts(monkeypatch):
    line = LaunchLine(SCRIPT, [], num_ranks=8, max_ranks=None, timeout_s=1)
    monkeypatch.setattr(command, "_available_gb", lambda: 3.5 * command._GB_PER_RANK)
    assert command._replicas(line, cluster(tensor_model_parallel_size=2)) == 1
    with pytest.raises(
        ReGateError, match=r"given a layout of at least 4 ranks and \d\.\d GB of free memory; allowed .*"
    ):
        command._replicas(line, cluster(tensor_model_parallel_size=4))


def test_a_torchrun_line_says_how_many_ranks():
    words = f"torchrun --nnodes 4 --nproc-per-node 8 -m regate_megatron {SCRIPT} --regate".split()
    line = parse_line(words)
    assert (line.num_ranks, line.script, line.flags) == (32, SCRIPT, ["--regate"])
    assert parse_line(["--nproc", "16", SCRIPT, "--lr", "1"]).flags == ["--lr", "1"]


@pytest.mark.parametrize("words", [[], ["--nproc", "8"], ["--nproc", "8", "no_such.py"], [SCRIPT], ["--nproc", "x"]])
def test_a_command_that_says_too_little_is_refused(words):
    with pytest.raises(ReGateError, match=r"^regate: dry-run: given .*; allowed .*; change "):
        parse_line(words)


def test_the_reason_of_a_failure_is_one_line():
    failed = Ended([1, -9], first=1)
    refusal = "noise\nregate: model: given X; allowed Y; change Z\n[rank0]: ValueError: later"
    assert _reason(refusal, failed, 60) == "regate: model: given X; allowed Y; change Z"
    assert (
        _reason("usage\nx.py: error: unrecognized arguments: --y\n", failed, 60)
        == "x.py: error: unrecognized arguments: --y"
    )
    assert _reason("[rank1]: AssertionError: no\nValueError: later", failed, 60) == "[rank1]: AssertionError: no"
    closed = "[rank1]: RuntimeError: Connection closed by peer"
    killed = "a rank killed by the system, most likely for want of memory"
    assert _reason(closed, Ended([-9, 1], first=-9), 60) == killed
    assert _reason(closed, Ended([-9, -9], first=-9, timed_out=True), 60) == "no end after 60 s"


def test_forked_ranks_end_with_the_first_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "_SECONDS_FOR_THE_OTHERS", 0.1)

    def work():
        rank = int(os.environ["RANK"])
        os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}".encode())
        sys.exit(3) if rank else time.sleep(60)

    assert forked.run(2, work, log=tmp_path / "log", timeout_s=50) == Ended([-9, 3], first=3)
    assert [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)] == ["rank 0 of 2", "rank 1 of 2"]


def test_forked_ranks_end_at_the_limit(tmp_path):
    ended = forked.run(2, lambda: time.sleep(60), log=tmp_path / "log", timeout_s=0.2)
    assert ended == Ended([-9, -9], first=-9, timed_out=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--help"], ["torchrun", "dry-run", "doctor", "--regate-keep-ratio"]), (["dry-run", "--help"], ["--nproc 32"])],
)
def test_help_needs_no_script(words, said):
    command = [sys.executable, "-m", "regate_megatron", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0 and not run.stderr and all(word in run.stdout for word in said), run.stdout + run.stderr


def _dry_run(*flags: str, nproc: int = 32) -> Finished:
    pytest.importorskip("megatron.training", reason="megatron.training is not installed")
    return program(["-m", "regate_megatron", "dry-run", "--max-ranks", "4", "--nproc", nproc, SCRIPT, *flags])


def test_a_cluster_line_runs_in_its_layout():
    run = _dry_run(*MODEL, *SIZES, *REGATE)
    assert run.returncode == 0, run.output + run.errors
    for said in (
        "TP2 PP2 VPP4 DP8",
        "TP2 PP2 VPP4 DP1 on gloo ranks ran 4 steps: its last step, an evaluation, a sparse step, a checkpoint",
        "2 sparse steps",
        "num-layers 32 -> 8",
        "data and tokenizer to mock data (/no/such_text_document is not here)",
        "[dry run] ok",
    ):
        assert said in run.output, run.output
    assert not Path("/no").exists()  # what the run writes goes to its temporary folder


@pytest.mark.full
def test_a_cluster_line_with_a_ratio_that_moves_and_dense_ends_runs():
    run = _dry_run(*MODEL, *REGATE, *MOVING, "--tensor-model-parallel-size", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    # Of four layers one runs short, on the smaller of the two ratios.
    for said in (
        "the last two sparse with the ratio they end with, 0.4",
        "targets kept 104/256 (40.6%)",
        "dense-equivalent 85.2%",
        "[dry run] ok",
    ):
        assert said in run.output, run.output


@pytest.mark.parametrize(
    ("flags", "nproc", "words"),
    [
        (SIZES, 30, ("at 30 ranks", "world size")),
        (["--tensor-model-parallel-size", "8"], 32, ("given a layout of at least 8 ranks", "--max-ranks")),
        pytest.param(
            [*SIZES, "--regate-dense-layers", "6"],
            32,
            ("--regate-dense-layers", "first pipeline chunk"),
            marks=pytest.mark.full,  # found where the chunk is built: on the ranks
        ),
    ],
    ids=["ranks", "machine", "dense-layers"],
)
def test_a_line_that_cannot_train_is_refused_in_one_line(flags, nproc, words):
    run = _dry_run(*MODEL, *REGATE, *flags, nproc=nproc)
    assert run.returncode == 1
    said = run.errors.strip().splitlines()[-1]
    assert said.startswith("regate: ") and all(word in said for word in (*words, "given", "allowed", "change")), said
    assert "Traceback" not in run.errors
