"""ReGATE in Megatron's own training loop, started by the launcher, on gloo ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT, Finished, ranks, succeed, torchrun

SCRIPT = ROOT / "tests/multiprocess/run_pretrain.py"
MODEL = """--num-layers 4 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2
 --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 16 --seq-length 32
 --max-position-embeddings 32 --position-embedding-type rope --eval-iters 1 --eval-interval 6 --log-interval 1
 --num-workers 0 --hidden-dropout 0 --attention-dropout 0 --calculate-per-token-loss
 --untie-embeddings-and-output-weights""".split()
REGATE = "--regate --regate-score regate --regate-warmup-steps 2 --regate-cycle-steps 4 --regate-dense-steps 1".split()


def _train(num_ranks: int, *flags: str, ok: bool = True, iterations: int = 6, how=ranks) -> Finished:
    command = ["-m", "regate_megatron", "--cpu", str(SCRIPT), *MODEL, "--train-iters", str(iterations), *flags]
    return succeed(num_ranks, command, how=how) if ok else how(num_ranks, command)


def _losses(output: str) -> list[tuple[str, str]]:
    """(loss, gradient norm) of every logged iteration, as printed."""
    return re.findall(r"iteration +\d+/.*?lm loss: (\S+) .*?grad norm: (\S+)", output)


def _weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = _load_state_dict_from_keys(storage_reader=FileSystemReader(folder / f"iter_{iteration:07d}"))
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Megatron without ReGATE: 6 iterations at PP2, saved."""
    folder = tmp_path_factory.mktemp("plain")
    run = _train(2, "--pipeline-model-parallel-size", "2", "--save", str(folder), "--save-interval", "6")
    return run, folder


@pytest.fixture(scope="module")
def sparse(plain, tmp_path_factory):
    """ReGATE at TP2×PP2, traced; the teacher's checkpoint has the same tokenizer, padded by another rule."""
    folder = tmp_path_factory.mktemp("sparse")
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    layout += ["--make-vocab-size-divisible-by", "128"]
    flags = ["--regate-teacher-load", str(plain[1]), "--regate-trace", str(folder), "--tensorboard-dir", str(folder)]
    return _train(4, *layout, *REGATE, *flags), folder


def test_keep_ratio_one_is_plain_megatron_bit_for_bit(plain, tmp_path):
    run, folder = plain
    regate = _train(
        2,
        *("--pipeline-model-parallel-size", "2", "--save", str(tmp_path), "--save-interval", "6"),
        *REGATE,
        *("--regate-keep-ratio", "1.0", "--regate-teacher-load", "student"),
    )
    assert len(_losses(run.output)) == 6
    assert _losses(regate.output) == _losses(run.output)
    ours, theirs = _weights(tmp_path, 6), _weights(folder, 6)
    assert ours.keys() == theirs.keys()  # C4: names are unchanged, nothing of ours among them
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert not (tmp_path / "regate_teacher").exists(), "nothing is ever left out, so no teacher is kept"


def test_sparse_training_runs_and_evaluates_dense(sparse):
    run, _ = sparse
    assert len(_losses(run.output)) == 6
    assert "validation loss at iteration 6" in run.output
    assert run.output.count("[regate] attached to GPTModel (TP2 PP2 DP1)") == 1
    assert "; budget dealt (every sample keeps its share, one replica has nothing to deal); " in run.output


def test_log_line_counts_targets_and_positions(sparse):
    lines = [line for line in sparse[0].output.splitlines() if line.startswith("[regate] iteration")]
    assert len(lines) == 6
    assert "| warmup (0/1 steps sparse) | targets kept 256/256 (100.0%)" in lines[0]
    assert "| sparse (1/1 steps sparse) | targets kept 128/256 (50.0%) | positions run 128/256 (50.0%)" in lines[3]
    assert "dense-equivalent 62.5%" in lines[3]  # one of four layers dense, three at one half


def test_the_first_sparse_step_says_once_whether_it_is_worth_it(sparse):
    lines = [line for line in sparse[0].output.splitlines() if line.startswith("[regate] i")]
    at = [number for number, line in enumerate(lines) if line.startswith("[regate] is it worth it?")]
    assert at == [4] and "| sparse (1/1 steps sparse) |" in lines[3]
    assert "Of the positions 100.0% are answer tokens and 0.0% visual; 50.0% went; a sparse step is" in lines[4]
    assert "times as fast; the teacher costs" in lines[4] and lines[4].endswith(": worth it")


def test_trace_has_the_documented_shape(sparse):
    records = [json.loads(line) for line in (sparse[1] / "dp00000.jsonl").read_text().splitlines()]
    assert len(records) == 6 * 4
    assert [r["phase"] for r in records[::4]] == ["warmup", "warmup", "dense", "sparse", "sparse", "sparse"]
    assert {r["iteration"] for r in records} == set(range(1, 7))
    for record in records:
        assert set(record) == {
            *(
                "iteration",
                "phase",
                "fallback",
                "dp_rank",
                "microbatch",
                "dense_length",
                "kept_length",
                "plan_hash",
                "rows",
            )
        }
        assert record["dense_length"] == 32 and len(record["rows"]) == 2 and not record["fallback"]
        for row in record["rows"]:
            assert set(row) == {
                "sample_key",
                "num_context",
                "num_targets",
                "num_kept_targets",
                "num_visual",
                "num_kept_visual",
                "kept",
                "scores",
            }
            assert len(row["kept"]) == row["num_context"] + row["num_kept_targets"] <= record["kept_length"]
            if record["phase"] == "sparse":
                kept = set(row["kept"])
                scores = {int(position): score for position, score in row["scores"].items()}
                assert len(scores) == row["num_targets"]
                elided = [score for position, score in scores.items() if position not in kept]
                assert max(elided) <= min(score for position, score in scores.items() if position in kept)


def test_balanced_ranks_run_alike_and_the_log_says_so(tmp_path):
    flags = ["--regate-budget", "balanced", "--regate-score", "random", "--regate-trace", str(tmp_path)]
    run = _train(2, *REGATE, *flags, how=torchrun)  # one run as a user starts it
    positions = [{}, {}]
    for rank, by_step in enumerate(positions):
        for record in map(json.loads, (tmp_path / f"dp{rank:05d}.jsonl").read_text().splitlines()):
            step = record["iteration"]
            by_step[step] = by_step.get(step, 0) + record["kept_length"] * len(record["rows"])
    assert positions[0] == positions[1] and positions[0][4] < positions[0][3] == 4 * 32
    assert "; budget balanced (no row moves, and replicas run the same total); " in run.output
    lines = [line for line in run.output.splitlines() if line.startswith("[regate] iteration")]
    assert "| max/mean over ranks 1.000 |" in lines[3] and "max/mean" not in lines[2]


def test_tensorboard_gets_our_scalars(sparse):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(sparse[1])).Reload()
    kept = [event.value for event in events.Scalars("regate/targets-kept")]
    assert kept == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


def test_layouts_train_alike(plain, sparse, tmp_path):
    """One rank, DP2 and TP2×PP2 print the same losses and keep the same positions from one start."""
    flags = [*REGATE, "--regate-teacher-load", str(plain[1]), "--load", str(plain[1]), "--finetune", "--no-load-optim"]
    flags += ["--no-load-rng", "--regate-trace"]
    one = _train(1, *flags, str(tmp_path / "one"))
    two = _train(2, *flags, str(tmp_path / "two"))
    four = _train(
        *(4, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", *flags, str(tmp_path / "four"))
    )
    for run in (two, four):
        for (loss, _), (expected, _) in zip(_losses(run.output), _losses(one.output), strict=True):
            assert float(loss) == pytest.approx(float(expected), rel=1e-5)

    def kept(folder: Path) -> dict:
        rows = {}
        for file in folder.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                rows |= {(record["iteration"], row["sample_key"]): row["kept"] for row in record["rows"]}
        return rows

    assert kept(tmp_path / "one") == kept(tmp_path / "two") == kept(tmp_path / "four")


def _refusal(run: Finished, num_ranks: int) -> str:
    """The one line; every rank has exited by itself."""
    lines = [line for line in run.errors.splitlines() if line.startswith("regate: ")]
    assert len(lines) == 1, run.errors[-3000:]
    assert all(word in lines[0] for word in ("given", "allowed", "change"))
    assert run.codes == (1,) * num_ranks or (not run.codes and re.search(r"exitcode\s+: 1 ", run.errors))  # of torchrun
    return lines[0]


def test_bad_ratio_is_refused_before_anything_starts():
    flags = ["--regate", "--regate-keep-ratio", "1.5", "--regate-teacher-load", "student"]
    run = _train(2, *flags, ok=False, how=torchrun)
    assert run.returncode != 0
    assert "--regate-keep-ratio: given 1.5" in _refusal(run, 2)


def test_missing_teacher_is_refused_on_all_ranks(tmp_path):
    run = _train(2, *REGATE, "--regate-teacher-load", str(tmp_path / "none"), ok=False)
    assert "which is no folder" in _refusal(run, 2)


def test_teacher_with_another_vocabulary_is_refused(plain):
    flags = ["--vocab-size", "80", *REGATE, "--regate-teacher-load", str(plain[1])]
    line = _refusal(_train(2, "--tensor-model-parallel-size", "2", *flags, ok=False), 2)
    assert "a teacher with a vocabulary of 64" in line and "80 tokens" in line


def test_unsupported_flags_are_refused_before_megatron_looks_at_them():
    """CUDA graphs would fail in Megatron itself on this machine, for reasons of its own."""
    run = _train(1, "--window-size", "8,0", *REGATE, "--regate-score", "student", ok=False)
    assert "sliding-window attention" in _refusal(run, 1)


@pytest.fixture
def known_flags():
    """Our flags in Megatron's parser, for one test."""
    from megatron.training import arguments

    from regate_megatron.integrations.flags import add_flags
    from regate_megatron.integrations.patching import unpatch

    add_flags()
    yield
    unpatch(arguments)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--window-size", "8,0"], "sliding-window attention"),
        (["--mtp-num-layers", "1", "--context-parallel-size", "2"], "multi-token prediction"),
        (["--cuda-graph-impl", "full_iteration"], "CUDA graphs"),
        (["--overlap-moe-expert-parallel-comm"], "combined 1F1B"),
        (["--num-experts", "4", "--moe-expert-capacity-factor", "1.5"], "expert capacity"),
        (["--multi-latent-attention"], "multi-latent attention"),
        (["--position-embedding-type", "relative"], "position embedding"),
        (["--use-megatron-fsdp"], "fully sharded data parallel"),
    ],
)
def test_flags_are_refused(known_flags, flags, what):
    from regate_megatron import ReGateError
    from regate_megatron.integrations.flags import read_flags

    asked = [*MODEL, "--micro-batch-size", "1", *REGATE, "--regate-score", "student"]
    assert read_flags(asked).score == "student"
    with pytest.raises(ReGateError, match=f"^regate: {what}: given .*; allowed .*; change .*") as refusal:
        read_flags([*asked, *flags])
    assert refusal.value.everywhere


def test_resumed_run_keeps_its_teacher(tmp_path):
    flags = [*REGATE, "--regate-teacher-load", "student", "--save", str(tmp_path), "--save-interval", "4"]
    flags += ["--override-opt-param-scheduler"]
    _train(2, "--tensor-model-parallel-size", "2", *flags, iterations=4)
    kept = (tmp_path / "regate_teacher" / ".metadata").stat().st_mtime_ns
    resumed = _train(2, "--tensor-model-parallel-size", "2", *flags, "--load", str(tmp_path), iterations=6)
    assert "[regate] resumed at iteration 4: difficulty of" in resumed.output
    assert (tmp_path / "regate_teacher" / ".metadata").stat().st_mtime_ns == kept


def test_a_plan_that_differs_on_one_rank_stops_all_ranks():
    flags = ["--tensor-model-parallel-size", "2", *REGATE, "--regate-score", "student"]
    worker = str(ROOT / "tests/multiprocess/run_diverged.py")
    run = ranks(4, [worker, "--cpu", str(SCRIPT), *MODEL, "--train-iters", "6", *flags])
    assert run.codes == (1,) * 4, "every rank ends by itself"
    assert "step plan: given different plans on one replica" in run.errors
    assert run.output.count("[regate] iteration") == 3  # it stopped at the first sparse step
