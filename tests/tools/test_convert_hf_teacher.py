"""tools/convert_hf_teacher.py: logits agree with transformers in every layout, round trips keep every bit, the rest is
refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.launch import succeed
from tests.tools.helpers import (
    ROOT,
    assert_same_bits,
    edit_config,
    refusal,
    run,
    tensors,
    tool,
    write_model,
)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
MODELS = {
    "llama": ("llama", {"rms_norm_eps": 1e-3}),
    "llama-tied-llama3-rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
}
LAYOUTS = {"tp1-dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


@pytest.fixture(scope="module")
def convert():
    return tool("convert_hf_teacher")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> Hugging Face folder, fp32."""
    root = tmp_path_factory.mktemp("hf")
    return {name: write_model(kind, root / name, **options) for name, (kind, options) in MODELS.items()}


def printed_flags(output: str) -> list[str]:
    """The flags the tool printed, with a tokenizer that needs no files."""
    words = shlex.split(output.split("its flags:")[1])
    return [*words[: words.index("--tokenizer-type")], "--tokenizer-type", "NullTokenizer", "--vocab-size", "59"]


@pytest.fixture(scope="module")
def compared(models, convert, tmp_path_factory):
    """(model, layout) -> what the Megatron side found."""
    root = tmp_path_factory.mktemp("megatron")
    cases, names = [], []
    for name, folder in models.items():
        for layout, (tensor_size, pipeline_size) in LAYOUTS.items():
            target = root / f"{name}-{tensor_size}"
            options = ["--source", folder, "--target", target, "--tensor-model-parallel-size", tensor_size]
            options += ["--dry-run", "--overwrite"] if layout == "pp2" else []
            with contextlib.redirect_stdout(io.StringIO()) as output:
                run(convert, *options)
            cases.append({"hf": str(folder), "megatron": str(target), "flags": printed_flags(output.getvalue())})
            cases[-1] |= {"tp": tensor_size, "pp": pipeline_size}
            names.append((name, layout))
    (root / "cases.json").write_text(json.dumps(cases))
    succeed(2, ["tests/tools/run_convert.py", root / "cases.json", root / "results.json"])
    return dict(zip(names, json.loads((root / "results.json").read_text()), strict=True))


def _environment():
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_loaded_as_a_teacher_and_by_megatron(compared, name, layout):
    result = compared[name, layout]
    assert result["scale"] > 0.5, "weights too small to tell"
    assert max(result["differences"]) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_teacher_has_its_own_rotary_frequencies_and_epsilon_beside_a_student_of_others(compared, name, layout):
    assert compared[name, layout]["teacher_of_another_student"] < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_stored_arguments_are_those_the_printed_flags_give(compared, name):
    # what belongs to the run, and what Megatron derives from the tokenizer
    of_the_run = {"seq_length", "no_save_optim", "no_save_rng", "vocab_size", "padded_vocab_size"}
    assert set(compared[name, "tp1-dp2"]["arguments"]) <= of_the_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_every_bit_and_the_config(convert, tmp_path, name, dtype):
    kind, options = MODELS[name]
    source = write_model(kind, tmp_path / "hf", dtype, shard="20KB", **options)
    assert (source / "model.safetensors.index.json").exists(), "several shards"
    (source / "tokenizer.json").write_text("{}")
    run(convert, "--source", source, "--target", tmp_path / "megatron", "--tensor-model-parallel-size", 3)
    run(convert, "--to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "again")
    assert_same_bits(tensors(tmp_path / "again"), tensors(source))
    assert (tmp_path / "again" / "config.json").read_text().strip() == (source / "config.json").read_text().strip()
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", MODELS)
def test_config_made_from_megatrons_arguments_gives_the_same_model(convert, models, tmp_path, name):
    import transformers

    run(convert, "--source", models[name], "--target", tmp_path / "megatron")
    (tmp_path / "megatron" / "config.json").unlink()
    run(convert, "--to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "again")
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (models[name], tmp_path / "again")
    )
    assert type(before) is type(after)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_old_configs_with_rope_theta_at_the_top_mean_the_same(convert, models, tmp_path, capsys):
    old = shutil.copytree(models["qwen2"], tmp_path / "old")
    edit_config(old, rope_parameters=None, rope_theta=1000000.0, rope_scaling=None)
    run(convert, "--source", old, "--target", tmp_path / "new", "--dry-run")
    assert "--rotary-base 1000000 " in capsys.readouterr().out


def test_output_is_sharded_and_read_again(convert, models, tmp_path, monkeypatch):
    from regate_megatron.checkpoints import safetensors_folder

    monkeypatch.setattr(safetensors_folder.write_safetensors, "__kwdefaults__", {"shard_bytes": 30_000})
    run(convert, "--source", models["llama"], "--target", tmp_path / "megatron")
    run(convert, "--to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-0*.safetensors"))) > 2
    assert_same_bits(tensors(tmp_path / "again"), tensors(models["llama"]))
    run(convert, "--source", tmp_path / "again", "--target", tmp_path / "twice")


def test_vocabulary_is_padded_with_zeros_as_megatron_pads(convert, models, tmp_path, capsys):
    from regate_megatron.checkpoints.torch_dist import TorchDistReader

    options = ["--tensor-model-parallel-size", 4, "--make-vocab-size-divisible-by", 6]
    run(convert, "--source", models["llama"], "--target", tmp_path / "megatron", *options)
    assert "12 rows of zeros" in capsys.readouterr().out
    words = TorchDistReader(tmp_path / "megatron").read("embedding.word_embeddings.weight")
    assert words.shape == (72, 32)
    assert torch.equal(words[:60], tensors(models["llama"])["model.embed_tokens.weight"]) and not words[60:].any()


def test_divisor_makes_megatron_pad_a_smaller_tokenizer_to_the_embedding(convert, models, tmp_path, capsys):
    source = shutil.copytree(models["llama"], tmp_path / "hf")
    tokens = {"model": {"vocab": {f"t{index}": index for index in range(49)}}, "added_tokens": [{"id": 49}]}
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    options = ["--tensor-model-parallel-size", 2, "--make-vocab-size-divisible-by", 1, "--dry-run"]
    run(convert, "--source", source, "--target", tmp_path / "new", *options)
    divisor = int(capsys.readouterr().out.split("--make-vocab-size-divisible-by")[-1].split()[0])
    assert -(-50 // (2 * divisor)) * 2 * divisor == 60


def test_dtype_option_converts(convert, models, tmp_path):
    run(convert, "--source", models["llama"], "--target", tmp_path / "megatron", "--dtype", "bf16")
    run(convert, "--to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "again")
    want = {name: value.bfloat16() for name, value in tensors(models["llama"]).items()}
    assert_same_bits(tensors(tmp_path / "again"), want)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dry_run_writes_nothing(convert, models, tmp_path):
    run(convert, "--source", models["llama"], "--target", tmp_path / "new" / "deep", "--dry-run")
    assert not list(tmp_path.iterdir())


def test_conversion_needs_no_megatron(models, tmp_path):
    code = "import sys, runpy; sys.modules['megatron'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    for extra in (["--source", models["llama"]], ["--to-hf", "--source", tmp_path / "a", "--target", tmp_path / "b"]):
        command = [sys.executable, "-c", code, ROOT / "tools" / "convert_hf_teacher.py", *extra]
        command += [] if "--target" in extra else ["--target", tmp_path / "a"]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=_environment())
        assert result.returncode == 0, result.stderr


def test_help_has_examples():
    command = [sys.executable, str(ROOT / "tools" / "convert_hf_teacher.py"), "--help"]
    assert "examples:" in subprocess.run(command, capture_output=True, text=True, env=_environment()).stdout


@pytest.fixture
def copy(models, tmp_path):
    """A Hugging Face llama to be damaged."""
    return shutil.copytree(models["llama"], tmp_path / "copy")


@pytest.mark.parametrize(
    "values, named",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1.5, "rope_theta": 1e4}}, "1.5"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"vocab_size": 61}, "a vocabulary of 60 in model.embed_tokens.weight"),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"intermediate_size": 64}, "of shape (48, 32)"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers 'two'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
        ({"rope_parameters": "default"}, "rope_parameters 'default'"),
    ],
)
def test_refuses_what_megatron_cannot_express_or_the_weights_do_not_say(convert, copy, tmp_path, capsys, values, named):
    edit_config(copy, **values)
    assert named in refusal(convert, capsys, "--source", copy, "--target", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refuses_missing_and_truncated_shards_and_pickles(convert, tmp_path, capsys):
    source = write_model("llama", tmp_path / "hf", shard="40KB")
    victim = sorted(source.glob("model-0*.safetensors"))[1]
    size = victim.stat().st_size
    os.truncate(victim, size - 7)
    assert f"{victim.name} is truncated" in refusal(convert, capsys, "--source", source, "--target", tmp_path / "new")
    victim.unlink()
    assert f"{victim.name} is missing" in refusal(convert, capsys, "--source", source, "--target", tmp_path / "new")
    save_file({"other": torch.zeros(1)}, victim)
    assert "lacks" in refusal(convert, capsys, "--source", source, "--target", tmp_path / "new")
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").touch()
    assert "pickles" in refusal(convert, capsys, "--source", source, "--target", tmp_path / "new")


def test_refuses_folders_that_are_no_models(convert, tmp_path, capsys):
    assert "no folder" in refusal(convert, capsys, "--source", tmp_path / "none", "--target", tmp_path / "new")
    assert "config.json" in refusal(convert, capsys, "--source", tmp_path, "--target", tmp_path / "new")
    line = refusal(convert, capsys, "--to-hf", "--source", tmp_path, "--target", tmp_path / "new")
    assert "holds no checkpoint" in line
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")
    assert "in another format" in refusal(
        convert, capsys, "--to-hf", "--source", tmp_path, "--target", tmp_path / "new"
    )


def test_refuses_targets_that_exist_or_cannot_be_written(convert, models, tmp_path, capsys):
    source = ["--source", models["llama"]]
    run(convert, *source, "--target", tmp_path / "new")
    assert "--overwrite" in refusal(convert, capsys, *source, "--target", tmp_path / "new")
    run(convert, *source, "--target", tmp_path / "new", "--overwrite")
    (tmp_path / "file").touch()
    assert "no folder that can be" in refusal(convert, capsys, *source, "--target", tmp_path / "file" / "new")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    assert "no checkpoint" in refusal(convert, capsys, *source, "--target", tmp_path / "photos", "--overwrite")
    assert "in the source" in refusal(convert, capsys, *source, "--target", models["llama"] / "inside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "photos"], "nothing is left aside"


def test_failure_while_writing_leaves_nothing(convert, models, tmp_path, capsys, monkeypatch):
    from regate_megatron.checkpoints import to_megatron

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_megatron, "write_torch_dist", full_disk)
    assert "No space left" in refusal(convert, capsys, "--source", models["llama"], "--target", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_export_refuses_another_models_config_vocabulary_and_damage(convert, models, tmp_path, capsys):
    megatron = tmp_path / "megatron"
    run(convert, "--source", models["llama"], "--target", megatron)
    back = ["--to-hf", "--source", megatron, "--target", tmp_path / "new"]
    assert "--like: given qwen2" in refusal(convert, capsys, *back, "--like", models["qwen2"])
    other = shutil.copytree(models["llama"], tmp_path / "other")
    edit_config(other, rms_norm_eps=1e-5)
    assert "norm_eps" in refusal(convert, capsys, *back, "--like", other)
    edit_config(other, rms_norm_eps=1e-3, vocab_size=200)
    assert "a vocabulary of 128 for a config with 200" in refusal(convert, capsys, *back, "--like", other)
    assert "no-family" in refusal(convert, capsys, *back, "--family", "no-family")
    (data,) = (megatron / "release").glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    assert "cannot be read" in refusal(convert, capsys, *back)
    assert not (tmp_path / "new").exists()
