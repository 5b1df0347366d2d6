"""tools/extract_teacher.py on Hugging Face vision-language models: their text backbone, as transformers and Megatron
compute it, under every naming that versions of transformers have used."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.launch import succeed
from tests.tools.helpers import SMALL, assert_same_bits, edit_config, fill, refusal, run, tensors, tool, write_model
from tests.tools.test_convert_hf_teacher import printed_flags

SEEN = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
# the image token is the last of the vocabulary; texts have none
LAST = SMALL["vocab_size"] - 1
QWEN_TOKENS = {f"{name}_token_id": LAST - n for n, name in enumerate(("image", "video", "vision_start", "vision_end"))}
MODELS = {
    "llava": {
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": SEEN | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "image_token_index": LAST,
    },
    "qwen2_vl": {
        "text_config": SMALL | MROPE,
        "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 16, "hidden_size": 32},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": SMALL | MROPE | {"tie_word_embeddings": True},
        "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "out_hidden_size": 32},
        "tie_word_embeddings": True,
        **QWEN_TOKENS,
    },
    "internvl": {
        "text_config": SMALL | {"model_type": "qwen2"},
        "vision_config": SEEN | {"image_size": [8, 8], "patch_size": [4, 4]},
        "tie_word_embeddings": False,
        "image_token_id": LAST,
    },
}
# How a language model's names begin: by version of transformers, and by the model's own code.
NAMINGS = {
    "before 4.52": ("language_model.model.", "language_model.lm_head."),
    "since 4.52": ("model.language_model.", "lm_head."),
    "flat": ("model.", "lm_head."),
}


@pytest.fixture(scope="module")
def extract():
    return tool("extract_teacher")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> folder of a vision-language model, fp32."""
    import transformers

    root = tmp_path_factory.mktemp("seeing")
    for name, options in MODELS.items():
        config = transformers.AutoConfig.for_model(name, **json.loads(json.dumps(options)))
        fill(transformers.AutoModelForImageTextToText.from_config(config)).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def compared(models, extract, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron")
    cases = []
    for name, folder in models.items():
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run(extract, "--source", folder, "--target", root / name, "--tensor-model-parallel-size", 2)
        flags = printed_flags(output.getvalue())
        cases.append({"hf": str(folder), "megatron": str(root / name), "flags": flags, "tp": 2, "pp": 1})
    (root / "cases.json").write_text(json.dumps(cases))
    succeed(2, ["tests/tools/run_convert.py", root / "cases.json", root / "results.json"])
    return dict(zip(models, json.loads((root / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_logits_of_text_equal_those_of_the_whole_model(compared, name):
    assert compared[name]["scale"] > 0.5 and max(compared[name]["differences"]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_causal_language_model_gives_the_whole_models_logits_of_text(models, extract, tmp_path, name):
    import transformers

    run(extract, "--source", models[name], "--target", tmp_path / "text", "--to-hf")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(models[name], dtype=torch.float32)
    text, missing = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(missing.values())
    tokens = torch.arange(1, 50)[None]
    with torch.no_grad():
        assert (whole(tokens).logits - text(tokens).logits).abs().max() < 1e-5
    assert not [key for key in tensors(tmp_path / "text") if "vis" in key or "projector" in key]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_every_naming_gives_the_same_bits(models, extract, tmp_path, name, naming):
    run(extract, "--source", models[name], "--target", tmp_path / "want", "--to-hf")
    want = tensors(tmp_path / "want")
    prefix, head = NAMINGS[naming]
    seen = {key: value for key, value in tensors(models[name]).items() if "vis" in key}
    assert seen
    if naming == "since 4.52":
        seen = {f"model.{key}": value for key, value in seen.items()}
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(models[name] / "config.json", source)
    renamed = {
        head + "weight" if key == "lm_head.weight" else prefix + key.removeprefix("model."): value
        for key, value in want.items()
    }
    save_file(renamed | ({} if naming == "flat" and name == "llava" else seen), source / "model.safetensors")
    run(extract, "--source", source, "--target", tmp_path / "found", "--to-hf")
    assert_same_bits(tensors(tmp_path / "found"), want)


def test_the_flat_config_of_older_qwen2_vl_means_the_same(models, extract, tmp_path, capsys):
    source = shutil.copytree(models["qwen2_vl"], tmp_path / "old")
    config = json.loads((source / "config.json").read_text())
    flat = config["text_config"] | {key: value for key, value in config.items() if key != "text_config"}
    del flat["rope_parameters"]
    flat |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (source / "config.json").write_text(json.dumps(flat))
    for folder in (models["qwen2_vl"], source):
        capsys.readouterr()
        run(extract, "--source", folder, "--target", tmp_path / "new", "--dry-run")
        flags = printed_flags(capsys.readouterr().out)
        assert "1000000" in flags and "--add-qkv-bias" in flags
    assert not (tmp_path / "new").exists()


def test_nothing_but_the_language_model_is_read(models, extract, tmp_path, monkeypatch):
    from regate_megatron.checkpoints.safetensors_folder import SafetensorsFolder

    read = []
    original = SafetensorsFolder.read
    monkeypatch.setattr(SafetensorsFolder, "read", lambda self, name: read.append(name) or original(self, name))
    run(extract, "--source", models["llava"], "--target", tmp_path / "text")
    assert read and all(name.startswith("language_model.") for name in read)


def test_refuses_a_language_model_another_family_and_a_megatron_checkpoint_to_hf(models, extract, tmp_path, capsys):
    target = ["--target", tmp_path / "new"]
    text = write_model("llama", tmp_path / "llama")
    assert "convert_hf_teacher" in refusal(extract, capsys, "--source", text, *target)
    other = shutil.copytree(models["llava"], tmp_path / "other")
    edit_config(other, text_config={"model_type": "internlm2"})
    assert "internlm2" in refusal(extract, capsys, "--source", other, *target)
    run(extract, "--source", models["llava"], "--target", tmp_path / "megatron")
    assert "already" in refusal(extract, capsys, "--source", tmp_path / "megatron", "--to-hf", *target)
    assert "extract_teacher" in refusal(tool("convert_hf_teacher"), capsys, "--source", models["llava"], *target)


def test_refuses_a_head_that_is_missing_and_a_target_that_exists(models, extract, tmp_path, capsys):
    source = shutil.copytree(models["llava"], tmp_path / "source")
    kept = {name: value for name, value in tensors(source).items() if "lm_head" not in name}
    save_file(kept, source / "model.safetensors")
    assert "lm_head" in refusal(extract, capsys, "--source", source, "--target", tmp_path / "new")
    run(extract, "--source", models["llava"], "--target", tmp_path / "text", "--to-hf")
    again = ["--source", models["llava"], "--target", tmp_path / "text", "--to-hf"]
    assert "--overwrite" in refusal(extract, capsys, *again)
    run(extract, *again, "--overwrite")
