"""``doctor --model``: what a Hugging Face configuration tells, without weights."""

from __future__ import annotations

import json

import pytest

from regate_megatron import doctor
from regate_megatron.support import models


def _answer(tmp_path, capsys, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = doctor.main(["--model", str(tmp_path)])
    return code, " ".join(capsys.readouterr().out.split())


def test_a_supported_model_is_told_its_hosts_and_how(tmp_path, capsys):
    vision = {"deepstack_visual_indexes": [8, 16, 24]}
    code, said = _answer(tmp_path, capsys, model_type="qwen3_vl", text_config={}, vision_config=vision)
    assert code == 0 and said.startswith("qwen3_vl: supported in Megatron-Bridge: finetune(config, qwen3_vl_step")
    assert "in ms-swift, over mcore-bridge: ms_swift.install(ReGateConfig(…))" in said
    assert "its first 3 layers take visual features in" in said


@pytest.mark.parametrize("kind", ["gemma3", "ovis2_5", "ernie4_5_moe_vl", "qwen3_5", "never_heard_of"])
def test_a_model_that_nobody_has_run_is_not_supported_and_the_reason_is_told(tmp_path, capsys, kind):
    code, said = _answer(tmp_path, capsys, model_type=kind)
    assert code == 1 and said.startswith(f"{kind}: not supported: ") and "supported are qwen2_5_vl" in said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_a_configuration_adds_can_rule_a_known_model_out(tmp_path, capsys, text, word):
    code, said = _answer(tmp_path, capsys, model_type="qwen2_5_vl", text_config=text)
    assert code == 1 and word in said


@pytest.mark.parametrize(
    "text",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 2},
    ],
)
def test_a_window_that_is_switched_off_rules_nothing_out(tmp_path, capsys, text):
    assert _answer(tmp_path, capsys, model_type="qwen2_5_vl", text_config=text)[0] == 0


def test_a_folder_without_a_configuration_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.main(["--model", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("regate: --model: given ") and error.count("\n") == 1 and "change" in error


@pytest.mark.parametrize("config", ["[1]", '{"hidden_size": 8}'])
def test_a_configuration_that_states_no_model_type_is_refused_in_one_line(tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(config)
    assert doctor.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"regate: --model: given {tmp_path}/config.json without model_type; allowed ")


@pytest.mark.parametrize(
    "values",
    [
        {"text_config": [1]},
        {"text_config": "x"},
        {"vision_config": [1]},
        {"vision_config": {"deepstack_visual_indexes": 5}},
        {"layer_types": 5},
    ],
    ids=str,
)
def test_a_configuration_of_another_form_is_refused_in_one_line(tmp_path, capsys, values):
    code, *_ = _answer(tmp_path, capsys, model_type="qwen3_vl", **values)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"} | values))
    assert code == doctor.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("regate: --model: given a configuration of qwen3_vl in another form (")
    assert error.count("\n") == 1


def test_no_model_is_supported_and_refused():
    assert not models.SUPPORTED.keys() & models.REFUSED.keys()


@pytest.mark.parametrize(
    ("kind", "name", "text", "code"),
    [
        ("internvl_chat", "llm_config", "qwen3", 0),
        ("internvl_chat", "llm_config", "internlm2", 1),
        ("internvl", "text_config", "qwen3_moe", 1),
        ("mistral3", "text_config", "ministral3", 0),
        ("mistral3", "text_config", "mistral", 1),
        ("llava", "text_config", "llama", 0),
        ("llava", "text_config", None, 0),
        ("llava", "text_config", "phi3", 1),
    ],
)
def test_a_model_is_supported_over_the_language_models_that_were_run(tmp_path, capsys, kind, name, text, code):
    inner = {"model_type": text} if text else {}
    found, said = _answer(tmp_path, capsys, model_type=kind, **{name: inner | {"hidden_size": 8}})
    assert found == code and (f"over {text} nobody has run it" in said) == bool(code)


@pytest.mark.parametrize("kind", [*models.SUPPORTED, *models.REFUSED])
def test_a_model_type_is_answered_without_a_network(kind, capsys):
    assert doctor.main(["--model", kind]) == (kind in models.REFUSED)
    said = capsys.readouterr().out
    assert f"{kind}: {'not ' if kind in models.REFUSED else ''}supported" in said


def test_a_misspelt_model_type_is_told_the_nearest(capsys):
    assert doctor.main(["--model", "qwen2_5vl"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("regate: --model: given qwen2_5vl; allowed a folder, its config.json, OWNER/NAME of ")
    assert error.endswith("change it to qwen2_5_vl\n")


def test_a_file_that_is_no_json_is_told_apart_from_none(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert doctor.main(["--model", str(tmp_path)]) == 1
    assert f"given {tmp_path / 'config.json'}, which is no JSON (" in capsys.readouterr().err
