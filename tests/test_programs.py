"""The demo, the benchmark and the learning experiment, as their make targets run them. Minutes each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.full


def _run(*command: str, timeout_s: int = 900) -> str:
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_quick_demo_leaves_its_files_and_counts_agree(tmp_path):
    output = _run("examples/demo/run.py", "--quick", "--out", str(tmp_path))
    assert "ReGATE" in output and "random" in output
    runs = {run["name"]: run for run in json.loads((tmp_path / "summary.json").read_text())["runs"]}
    assert set(runs) == {"dense", "regate", "random"}
    names = {
        "iterations",
        "targets_total",
        "targets_processed",
        "positions_dense",
        "positions_run",
        "eval_loss",
        "seconds",
    }
    assert all(names <= set(run) for run in runs.values())
    assert len({run["targets_total"] for run in runs.values()}) == 1  # the same samples
    assert runs["dense"]["targets_processed"] == runs["dense"]["targets_total"]
    assert runs["regate"]["targets_processed"] == runs["random"]["targets_processed"]
    sparse = [0, 0]
    for file in (tmp_path / "trace").glob("dp*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if record["phase"] == "sparse":
                sparse[0] += sum(row["num_kept_targets"] for row in record["rows"])
                sparse[1] += sum(row["num_targets"] for row in record["rows"])
    assert 0 < sparse[0] <= 0.7 * sparse[1]
    names = ("report.html", "kept_words.png", "kept_of_a_clip.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    assert "Words and patches" in (tmp_path / "report.html").read_text()
    last = json.loads((tmp_path / "trace_visual" / "dp00000.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "sparse" and all(row["num_kept_visual"] < row["num_visual"] for row in last["rows"])


def test_benchmarks_leave_one_table_one_picture_and_their_headline(tmp_path):
    output = _run("benchmarks/run.py", "--quick", "--out", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["headline"]) == {"conv", "planning_share", "speedup", "kept_share"}
    assert results["headline"]["kept_share"] == pytest.approx(0.5, abs=0.02)
    assert set(results["visual"]) == {"speedup", "conv", "kept_visual"}
    assert len(results["parts"]) == 7 and all(part["part"].replace("_", " ") in output for part in results["parts"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    published = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--write-docs", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert published.returncode and "not to be published" in published.stderr


TINY = (
    """
language_model = "{model}"
ranks = 1
jobs = 2
[data]
num_train = 64
num_heldout = 32
fresh_factor = 2
seed = 1
[pictures]
sort = "drawings"
size = 48
positions = 16
[environment]
ATEN_CPU_CAPABILITY = "avx2"
[train]
iterations = 8
eval_interval = 4
vision_recall = 0.01
vision_most_steps = 25
align_accuracy = {align_accuracy}
align_most_iterations = 8
align_interval = 4
align = "--lr 1e-3 --lr-decay-style constant"
text_iterations = 4
text = "--lr 1e-3 --lr-decay-style constant"
llava = "--lr 1e-3 --lr-decay-style constant"
shared = """
    + '''"""
    --global-batch-size 16 --micro-batch-size 16 --eval-micro-batch-size 32 --eval-global-batch-size 32 --eval-iters 1
    --vision-num-layers 1 --attention-dropout 0 --hidden-dropout 0 --calculate-per-token-loss --num-workers 0
"""'''
    + """
[regate]
keep_ratio = 0.5
warmup_steps = 2
cycle_steps = 4
dense_steps = 1
"""
)


def _tiny_language_model(folder):
    """A Llama of two layers from a seed, with byte pairs learned from a few captions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["The picture shows two red apples at the top, on a white background."] * 2, trainer)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **size, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_experiment_repeats_goes_on_where_it_was_and_says_when_a_start_has_not_learned(tmp_path):
    _tiny_language_model(tmp_path / "model")
    (tmp_path / "tiny.toml").write_text(TINY.format(model=tmp_path / "model", align_accuracy=0.0))
    (tmp_path / "strict.toml").write_text(TINY.format(model=tmp_path / "model", align_accuracy=0.99))
    command = ["examples/experiments/run.py", "--arms", "dense,regate", "--seeds", "1"]
    out = tmp_path / "out"
    tiny = [*command, "--config", str(tmp_path / "tiny.toml"), "--out", str(out)]

    def weights(name: str) -> list[str]:
        lines = (out / "runs" / name / "heldout.jsonl").read_text().splitlines()
        return [json.loads(line)["weights"] for line in lines]

    _run(*tiny)
    start = json.loads((out / "starts" / "1" / "about.json").read_text())
    assert start["align_iterations"] == 4  # a share of 0 is there at the first look
    dense, regate = weights("dense-1"), weights("regate-1")
    assert len(dense) == 2 and dense[-1] != regate[-1]
    made = (out / "runs" / "dense-1" / "heldout.jsonl").stat().st_mtime_ns

    shutil.rmtree(out / "runs" / "regate-1")
    (out / "runs" / "regate-1.incomplete").mkdir()  # as a killed run leaves it
    _run(*tiny)
    assert weights("regate-1") == regate  # the same bits
    assert (out / "runs" / "dense-1" / "heldout.jsonl").stat().st_mtime_ns == made

    _run(*tiny[:-1], str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "starts" / "1" / "about.json").read_text()) == start

    run = subprocess.run(
        [sys.executable, *command, "--config", str(tmp_path / "strict.toml"), "--out", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1
    assert all(word in last for word in ("given", "after 8 iterations with seed 1", "allowed 99.0%", "change"))
    assert json.loads((out / "starts" / "1" / "about.json").read_text()) == start
