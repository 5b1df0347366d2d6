"""The dry run: what it shrinks keeps every layout decision; a line that cannot train is one line of refusal."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from regate_megatron import ReGateConfig
from regate_megatron.cpu.dry_run.command import _reason, _worth_knowing
from regate_megatron.cpu.dry_run.flags import _regate, _unproven
from regate_megatron.cpu.dry_run.line import LaunchLine, parse_line
from regate_megatron.cpu.dry_run.shrink import (
    TRAIN_STEPS,
    data_parallel_size,
    least_ranks,
    shrink,
    smaller_layouts,
    weights_gb,
)
from regate_megatron.cpu.emulation import forked
from regate_megatron.cpu.emulation.arguments import options_of_megatron, take_out, what_goes
from regate_megatron.cpu.emulation.forked import Ended
from regate_megatron.errors import ReGateError
from regate_megatron.method.schedule import phase_of
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cycle_steps": 16, "dense_steps": 16},
        {"keep_ratio": 1.0, "keep_ratio_end": 0.4, "keep_ratio_steps": 900},
        {"keep_ratio": 1.0, "visual_keep_ratio": 1.0, "visual_keep_ratio_end": 0.2, "keep_ratio_steps": 900},
    ],
)
def test_the_small_run_leaves_out_what_the_whole_run_does_and_asks_the_same_teacher(settings):
    whole = ReGateConfig(**settings)
    flags = _regate(whole, 1)
    values = {name.removeprefix("--regate-").replace("-", "_"): value for name, value in flags.items()}
    few = dataclasses.replace(whole, **values)
    sparse = [n for n in range(TRAIN_STEPS) if phase_of(n, few.schedule) == "sparse" and few.elides_in(n)]
    assert sparse == ([2, 3] if whole.elides else [])
    assert [few.needs_teacher, few.ranks_visual] == [whole.needs_teacher, whole.ranks_visual]
    few.require_teacher()


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


def test_a_smaller_layout_of_the_same_kinds_halves_the_largest_size_first():
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 8, "context_parallel_size": 2}
    found = list(smaller_layouts(cluster(**sizes, world_size=64, num_layers_per_virtual_pipeline_stage=2)))
    assert found == [
        ({"--pipeline-model-parallel-size": 4, "--num-layers-per-virtual-pipeline-stage": 4}, 32),
        ({"--tensor-model-parallel-size": 2}, 32),
    ]
    assert (
        list(smaller_layouts(cluster(pipeline_model_parallel_size=4, pipeline_model_parallel_layout="Et|t|t|tL"))) == []
    )


def test_the_least_number_of_ranks_counts_the_experts():
    assert least_ranks(cluster(pipeline_model_parallel_size=4, expert_model_parallel_size=8)) == 32
    assert least_ranks(cluster(tensor_model_parallel_size=8, pipeline_model_parallel_size=16)) == 128
    tensor = {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    assert least_ranks(cluster(**tensor, expert_model_parallel_size=2)) == 4


def test_half_precision_starts_where_the_first_step_counts():
    assert "--initial-loss-scale" not in small()
    assert small(fp16=True)["--initial-loss-scale"] == 1
    assert small(fp16=True, min_loss_scale=4.0)["--initial-loss-scale"] == 4  # it must not be below
    assert small(fp16=True, loss_scale=65536.0)["--loss-scale"] == 1


def test_the_small_models_weight_counts_its_experts():
    sizes = {"moe_router_num_groups": 8, "moe_router_topk": 8, "num_experts": 256}
    dense, experts = cluster(), cluster(**sizes)
    few, many = weights_gb(small(), dense), weights_gb(small(**sizes), experts)
    assert many > 40 * few > 0


def test_a_torchrun_line_says_how_many_ranks():
    words = f"torchrun --nnodes 4 --nproc-per-node 8 -m regate_megatron {SCRIPT} --regate".split()
    line = parse_line(words)
    assert (line.num_ranks, line.script, line.flags) == (32, SCRIPT, ["--regate"])
    assert parse_line(["--nproc", "16", SCRIPT, "--lr", "1"]).flags == ["--lr", "1"]


@pytest.mark.parametrize(
    "words",
    [
        f"python -m torch.distributed.run --nproc-per-node 8 -m regate_megatron {SCRIPT} --regate",
        f"python3.12 -u -m torch.distributed.run --nproc-per-node 8 {SCRIPT} --regate",
        f"/usr/bin/torchrun --nproc-per-node 8 --no-python python -m regate_megatron --cpu {SCRIPT} --regate",
        f"--nproc 8 python {SCRIPT} --regate",
    ],
)
def test_other_names_of_torchrun_are_the_same_line(words):
    line = parse_line(words.split())
    assert (line.num_ranks, line.script, line.flags) == (8, SCRIPT, ["--regate"])


@pytest.mark.parametrize(
    "launcher", ["srun -n 8 python", "mpirun -np 8 python -m regate_megatron", "accelerate launch"]
)
def test_launchers_with_ways_of_their_own_are_told_how_to_write_it(launcher):
    with pytest.raises(ReGateError, match=f"given {launcher.split()[0]}; .* change it to: dry-run --nproc N {SCRIPT} "):
        parse_line([*launcher.split(), SCRIPT, "--regate"])


@pytest.mark.parametrize(
    ("flags", "per_token", "said"),
    [
        ([], False, "ReGATE is off: no --regate"),
        (["--regate-keep-ratio=0.3"], True, "ReGATE is off: --regate-keep-ratio given without --regate"),
        (["--regate"], False, "--calculate-per-token-loss is off"),
        (["--regate", "--regate-visual-score", "random"], True, "--regate-visual-score not used"),
        (["--regate"], True, None),
        (["--regate", "--regate-recipe", "pictures"], False, None),  # every target runs
    ],
    ids=str,
)
def test_what_passes_and_is_most_likely_not_meant_is_said(flags, per_token, said):
    from regate_megatron.flags import parse

    cluster = Namespace(calculate_per_token_loss=per_token)
    found = _worth_knowing(LaunchLine(SCRIPT, flags, 8, None, 900.0), cluster, parse(flags))
    assert len(found) == (said is not None) and all(one.startswith(said) for one in found)


@pytest.mark.parametrize(
    ("start", "is_bare"),
    [
        ("torchrun --nproc-per-node 8 -m regate_megatron", False),
        ("torchrun --nproc-per-node 8", True),
        ("--nproc 8 python", True),
        ("--nproc 8", False),
    ],
)
def test_a_line_that_starts_a_script_which_knows_no_flag_of_ours_is_told_so(start, is_bare, tmp_path):
    from regate_megatron.flags import parse

    script, patched, cluster = tmp_path / "train.py", tmp_path / "patched.py", Namespace(calculate_per_token_loss=True)
    script.write_text("train()\n")
    patched.write_text("import regate_megatron\n")
    line = parse_line([*start.split(), str(script), "--regate"])
    assert (
        _worth_knowing(line, cluster, parse(line.flags))
        == [f"{script} knows no --regate flags by itself: put -m regate_megatron before it, or patch it"] * is_bare
    )
    assert not parse_line([*start.split(), str(patched), "--regate"]).is_bare


@pytest.mark.parametrize("words", [[], ["--nproc", "8"], ["--nproc", "8", "no_such.py"], [SCRIPT]], ids=str)
def test_a_command_that_says_too_little_is_refused(words):
    with pytest.raises(ReGateError, match=r"^regate: dry-run: given .*; allowed .*; change "):
        parse_line(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nproc x", "--nproc: given invalid int value: 'x';"),
        ("--nproc", "--nproc: given no value;"),
        ("--norpc 8 torchrun", "given --norpc; .*; change it to --nproc$"),
        ("--max-ranks 0 torchrun", "given --max-ranks 0;"),
        ("--timeout nan torchrun", "given --timeout nan;"),
        ("torchrun --no-such-option 3", "given options torchrun does not know;"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_is_refused_in_that_line_alone(capsys, words, said):
    with pytest.raises(ReGateError, match=f"^regate: dry-run: {said}"):
        parse_line([*words.split(), SCRIPT] if "torchrun" in words else words.split())
    assert "".join(capsys.readouterr()) == ""


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


def test_estimate_reads_the_batches_of_a_line_at_their_full_length():
    """On one rank here, for the eight and the model of the line; the teacher of a score that needs one is counted."""
    lengths = ["--seq-length", "256", "--max-position-embeddings", "256", "--regate-teacher-load=/no/teacher"]
    command = ["-m", "regate_megatron", "estimate", "--max-ranks", "1", "--nproc", "8", SCRIPT]
    run = program([*command, *MODEL, *lengths, "--regate", "--regate-score", "reference"])
    assert run.returncode == 0, run.output + run.errors
    assert re.search(r"^\[estimate\] \d+ rows of 256 positions \(mean\): [\d.]+% answer tokens", run.output, re.M)
    assert "[estimate] 8 ranks of 32 rows" in run.output
    assert re.search(r"^\[estimate\] with --regate-budget .* teacher costs .*worth it", run.output, re.M)
    assert "[dry run] ok" in run.output and "seq-length" not in run.output.partition("shrunk")[2]


@pytest.mark.full
def test_a_cluster_line_with_a_ratio_that_moves_and_dense_ends_runs():
    run = _dry_run(*MODEL, *REGATE, *MOVING, "--tensor-model-parallel-size", "2")
    assert run.returncode == 0, run.output + run.errors
    # Of four layers one runs short, on the smaller of the two ratios.
    for said in (
        "the last two sparse with the ratio they end with, 0.4",
        "targets kept 104/256 (40.6%)",
        "dense-equivalent 85.2%",
        "[dry run] ok",
    ):
        assert said in run.output, run.output


TWO_LARGE = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "16"]


@pytest.mark.full
def test_a_layout_too_large_for_here_runs_as_the_largest_of_the_same_kinds():
    run = _dry_run(*MODEL, *REGATE, *TWO_LARGE, nproc=128)
    assert run.returncode == 0, run.output + run.errors
    assert "[dry run] too large for here; in its place TP2 PP2 DP1" in run.output
    assert "at 128 ranks: TP8 PP16 DP1" in run.output and "[dry run] ok" in run.output


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        "--fp16 --micro-batch-size 2",
        """--apply-layernorm-1p --use-precision-aware-optimizer --optimizer-cpu-offload --delay-wgrad-compute
        --fp8-format e4m3 --fp8-recipe mxfp8 --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag
        --overlap-grad-reduce --overlap-param-gather --log-progress""",
        """--num-experts 8 --moe-grouped-gemm --recompute-granularity selective --recompute-modules moe_act core_attn
        --moe-router-padding-for-fp8 --fp8-format hybrid""",
        "--tp-comm-overlap --cuda-graph-impl local --cuda-graph-scope attn --te-rng-tracker",
    ],
    ids=["fp16", "optimizer", "experts", "graphs"],
)
def test_what_is_right_on_a_gpu_is_not_blamed(flags):
    model = [word for word in MODEL if word != "--bf16"] if "--fp16" in flags else MODEL
    run = _dry_run(*model, *REGATE, *flags.split(), nproc=2)
    assert run.returncode == 0, run.output + run.errors
    assert "2 sparse steps" in run.output and ("taken out: " in run.output) == ("--fp16" not in flags)
    assert ("CUDA graphs: on in dense steps" in run.output) == ("--cuda-graph" in flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", []),
        ("--tp-comm-overlap --cuda-graph-impl local", ["tp_comm_overlap: on in dense", "CUDA graphs: on in dense"]),
        ("--decoder-tp-comm-overlap --enable-cuda-graph", ["tp_comm_overlap: on in dense", "CUDA graphs: on in dense"]),
        ("--num-experts 8 --moe-token-dispatcher-type flex", ["the flex dispatcher (deepep) was never run"]),
    ],
    ids="none graphs multimodal experts".split(),
)
def test_what_no_gpu_has_shown_is_told_of_the_line_as_given(flags, said):
    """The run itself has none of it: all of it needs a GPU."""
    pytest.importorskip("megatron.training", reason="megatron.training is not installed")
    line = LaunchLine(SCRIPT, [*MODEL, *flags.split()], 8, None, 900.0)
    found = _unproven(line, ReGateConfig(score="random"))
    assert [text[: len(start)] for text, start in zip(found, said, strict=True)] == said
    kept, went = take_out(line.flags, what_goes(), options_of_megatron())
    experts = ["--num-experts", "8"] if "--num-experts" in flags else []
    assert kept == [*MODEL, *experts] and bool(went) == bool(flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [("--micro-batch-size 4", True), ("--sft", True), ("--micro-batch-size 4 --no-rope-fusion", False), ("", False)],
)
def test_fused_rope_is_told_of_where_rows_are_several_or_packed(flags, said):
    pytest.importorskip("megatron.training", reason="megatron.training is not installed")
    line = LaunchLine(SCRIPT, [*MODEL, *flags.split()], 8, None, 900.0)
    found = _unproven(line, ReGateConfig(score="random"))
    assert [text.partition(":")[0] for text in found] == ["fused RoPE"] * said


def test_options_that_scripts_add_are_taken_out_where_they_need_a_gpu():
    pytest.importorskip("megatron.training", reason="megatron.training is not installed")
    kept, went = take_out("--use-te --img-h 32 --use-tiling".split(), what_goes(), options_of_megatron())
    assert kept == ["--img-h", "32", "--use-tiling"] and list(went.values()) == [["--use-te"]]


@pytest.mark.parametrize(
    ("flags", "nproc", "words"),
    [
        (SIZES, 30, ["number of ranks: given 30; allowed a multiple of 4, .* change it to 32"]),
        (TWO_LARGE, 8, ["number of ranks: given 8; allowed a multiple of 128"]),
        (
            [*"--pipeline-model-parallel-size 4 --num-experts 8 --expert-model-parallel-size 8".split()],
            8,
            ["number of ranks: given 8; allowed a multiple of 32"],
        ),
        (["--fp4-format", "e2m1"], 8, ["FP4: given fp4=e2m1"]),
        (["--skip-train"], 8, ["dry-run: given --skip-train: the line only evaluates"]),
        (
            "--skip-train --mtp-num-layers 1 --context-parallel-size 2 --cuda-graph-impl full_iteration".split()
            + "--regate-keep-ratio 7 --regate-seed -1".split(),
            8,
            [
                "--regate-keep-ratio: given 7.0",
                "--regate-seed: given -1",
                "multi-token prediction: .* change the command: leave --mtp-num-layers out",
                "CUDA graphs",
                "--skip-train",
            ],
        ),
        ([*SIZES, "--regate-dense-layers", "6"], 32, ["--regate-dense-layers: given 6 with 4 layers in the first pip"]),
    ],
    ids="ranks least experts fp4 evaluation several dense-layers".split(),
)
def test_a_line_that_cannot_train_is_refused_with_all_that_is_wrong(flags, nproc, words):
    run = _dry_run(*MODEL, *REGATE, *flags, nproc=nproc)
    assert run.returncode == 1 and "Traceback" not in run.errors
    said = [line for line in run.errors.splitlines() if line.startswith("regate: ")]
    assert len(said) == len(words), run.errors
    for line, pattern in zip(said, words, strict=True):
        assert re.search(pattern, line) and all(word in line for word in ("given", "allowed", "change")), line
    assert "pass" not in run.output


def test_an_older_megatron_is_one_line_in_every_command(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 9\nPATCH = 1\n")
    script = tmp_path / "train.py"
    script.write_text("print('trained')")
    for words in (
        ["dry-run", "--nproc", "2", script],
        ["--cpu", script],
        [script, "--regate", "--regate-score", "student"],
    ):
        command = [sys.executable, "-m", "regate_megatron", *map(str, words)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        said = f"regate: megatron-core: given 0.9.1 in {tmp_path}/megatron; allowed 0.17 to 0.20; change "
        assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith(said) and "Traceback" not in run.stderr
    run = subprocess.run(
        [*command[:3], str(script)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert run.stdout == "trained\n"  # without our flags nothing of Megatron is looked at


def test_the_dry_run_imports_no_launcher():
    """Arrows one way: ``__main__`` imports the dry run and what both share."""
    files = [*(ROOT / "regate_megatron/cpu").rglob("*.py"), ROOT / "regate_megatron/cpu/launch.py"]
    assert [
        file for file in files if "__main__ import" in file.read_text() or "import __main__" in file.read_text()
    ] == []
    shared = (ROOT / "regate_megatron/cpu/launch.py").read_text()
    assert "import dry_run" not in shared and "dry_run import" not in shared
