"""tools/inspect_checkpoint.py: each format is recognised and counted alike."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from torch.distributed import checkpoint

from regate_megatron.checkpoints.inspecting import Group
from tests.tools.helpers import refusal, run, tensors, tool, write_model


@pytest.fixture(scope="module")
def program():
    return tool("inspect_checkpoint")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    hf = write_model("qwen2", root / "hf", torch.bfloat16)
    convert, plain = tool("convert_hf_teacher"), ["--make-vocab-size-divisible-by", 1]
    run(convert, "--source", hf, "--target", root / "dist", *plain)
    run(tool("reshard"), "--source", root / "dist", "--target", root / "legacy", "--format", "torch",
        "--tensor-model-parallel-size", 2)  # fmt: skip
    return {"safetensors": hf, "torch_dist": root / "dist", "torch": root / "legacy"}


def report(program, capsys, folder):
    capsys.readouterr()
    run(program, folder, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["safetensors", "torch_dist", "torch"])
def test_every_format_is_recognised_and_counts_the_same_parameters(program, capsys, folders, kind):
    found = report(program, capsys, folders[kind])
    assert found["format"] == kind
    assert found["num_parameters"] == sum(value.numel() for value in tensors(folders["safetensors"]).values())
    assert list(found["parts"]) == ["language model"]
    groups = {group["name"]: group for group in found["parts"]["language model"]}
    proj = (
        "model.layers.{}.self_attn.o_proj.weight"
        if kind == "safetensors"
        else "decoder.layers.{}.self_attention.linear_proj.weight"
    )
    assert (groups[proj]["count"], groups[proj]["shape"], groups[proj]["dtype"]) == (2, [32, 32], "bfloat16")
    if kind != "safetensors":
        assert found["iteration"] == "release" and found["arguments"]["num_query_groups"] == 2
    if kind == "torch":
        assert found["layout"] == "TP2 PP1"


def test_text_names_the_parts_and_our_own_state(program, capsys, tmp_path):
    state = {
        "language_model.embedding.word_embeddings.weight": torch.zeros(4, 2),
        "vision_model.conv1.weight": torch.zeros(3, 2),
        "optimizer.state.exp_avg.x": torch.zeros(100),
        "regate.difficulty": torch.zeros(50),
    }
    checkpoint.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    (tmp_path / "c" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    capsys.readouterr()
    run(program, tmp_path / "c")
    text = capsys.readouterr().out
    for line in ("language model: yes", "vision tower: yes", "projector: no", "ReGATE state: yes", "14 parameters"):
        assert line in text


def test_refuses_what_is_no_checkpoint_or_not_to_be_trusted(program, capsys, folders, tmp_path):
    assert "no folder" in refusal(program, capsys, tmp_path / "none")
    assert "no checkpoint" in refusal(program, capsys, tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(print))
    assert "untrusted" in refusal(program, capsys, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_common_state_is_refused_and_a_missing_one_is_none(program, capsys, folders, tmp_path, damage):
    copy = shutil.copytree(folders["torch_dist"], tmp_path / "copy")
    file = copy / "release" / "common.pt"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": bytes(range(100, 200))}[damage])
    line = refusal(program, capsys, copy)
    assert f"{file.parent}, whose common.pt cannot be read" in line
    file.unlink()
    assert report(program, capsys, copy)["arguments"] == {}


def test_arguments_of_a_class_that_is_not_allowed_are_left_out(program, capsys, folders, tmp_path):
    copy = shutil.copytree(folders["torch_dist"], tmp_path / "copy")
    torch.save({"args": Group("of a fork", 0, (), "")}, copy / "release" / "common.pt")
    assert report(program, capsys, copy)["arguments"] == {}


def test_reading_arguments_leaves_torchs_list_of_safe_classes_as_it_was(program, folders):
    from argparse import Namespace

    with torch.serialization.safe_globals([Namespace]):
        before = set(torch.serialization.get_safe_globals())
        run(program, folders["torch_dist"])
        run(program, folders["torch"])
        assert set(torch.serialization.get_safe_globals()) >= before
