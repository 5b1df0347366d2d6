"""tools/export_student.py: a student that Megatron's own training loop loaded from our teacher and saved comes back as
the Hugging Face model it was, and trains with that teacher meanwhile."""

from __future__ import annotations

import contextlib
import io
import os

import pytest
import torch

from tests.launch import succeed
from tests.tools.helpers import assert_same_bits, edit_config, refusal, run, tensors, tool, write_model
from tests.tools.test_convert_hf_teacher import printed_flags

# a learning rate that changes no weight: what is exported must be what was loaded
TRAIN = """--micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-30 --weight-decay 0 --seq-length 32
 --eval-iters 0 --eval-interval 9 --log-interval 1 --num-workers 0 --save-interval 2
 --ckpt-format torch_dist --finetune""".split()
REGATE = "--regate --regate-score regate --regate-warmup-steps 1 --regate-cycle-steps 4 --regate-dense-steps 1".split()


@pytest.fixture(scope="module")
def export():
    return tool("export_student")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(Hugging Face folder, checkpoint of the student, output of the run)."""
    root = tmp_path_factory.mktemp("student")
    hf = write_model("llama", root / "hf", num_key_value_heads=4)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run(tool("convert_hf_teacher"), "--source", hf, "--target", root / "teacher", "--tensor-model-parallel-size", 2)
    flags = [*printed_flags(output.getvalue()), *TRAIN, *REGATE, "--tensor-model-parallel-size", "2"]
    flags += ["--load", str(root / "teacher"), "--save", str(root / "student")]
    flags += ["--regate-teacher-load", str(root / "teacher")]
    script = "tests/multiprocess/run_pretrain.py"
    done = succeed(2, ["-m", "regate_megatron", "--cpu", script, *flags])
    return hf, root / "student", done.output


def test_megatron_loads_the_teacher_as_its_checkpoint_and_regate_as_its_teacher(trained):
    _, student, output = trained
    assert "successfully loaded checkpoint" in output
    assert "steps sparse" in output and (student / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize("how", ["like", "family"])
def test_the_student_comes_back_bit_for_bit(trained, export, tmp_path, how):
    hf, student, _ = trained
    options = ["--like", hf] if how == "like" else ["--family", "llama", "--vocab-size", 60]
    run(export, "--source", student, "--target", tmp_path / "hf", *options)
    assert_same_bits(tensors(tmp_path / "hf"), tensors(hf))
    import transformers

    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (hf, tmp_path / "hf")
    )
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_dry_run_writes_nothing(trained, export, tmp_path):
    hf, student, _ = trained
    run(export, "--source", student, "--target", tmp_path / "new", "--like", hf, "--dry-run")
    assert not list(tmp_path.iterdir())


def test_refuses_what_does_not_fit_the_student(trained, export, tmp_path, capsys):
    hf, student, _ = trained
    options = ["--source", student, "--target", tmp_path / "new"]
    assert "qwen2" in refusal(export, capsys, *options, "--family", "qwen2", "--vocab-size", 60)
    wrong = write_model("llama", tmp_path / "wrong", num_key_value_heads=4, vocab_size=300)
    assert "a config with 300" in refusal(export, capsys, *options, "--like", wrong)
    edit_config(wrong, vocab_size=60, num_hidden_layers=3)
    assert "num_layers 3" in refusal(export, capsys, *options, "--like", wrong)
    assert "holds no checkpoint" in refusal(export, capsys, "--source", tmp_path, "--target", tmp_path / "new")
    assert "--overwrite" in refusal(export, capsys, "--source", student, "--target", hf, "--like", hf)
    (data, *_) = sorted((student / "iter_0000002").glob("*.distcp"))
    size = data.stat().st_size
    content = data.read_bytes()
    os.truncate(data, size // 3)
    assert "cannot be read" in refusal(export, capsys, *options, "--like", hf)
    data.write_bytes(content)
    assert not (tmp_path / "new").exists()
