"""What is read of a torch_dist checkpoint beside its weights: Megatron's common state, weights-only."""

from __future__ import annotations

import shutil
from argparse import Namespace

import pytest
import torch
from torch.distributed import checkpoint

from regate_megatron.checkpoints.torch_dist import TorchDistReader
from tests.tools.helpers import refusal, run, tool, write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("torch_dist")
    run(tool("convert_hf_teacher"), "--source", write_model("qwen2", root / "hf"), "--target", root / "megatron")
    return root / "megatron"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_common_state_is_refused_and_a_missing_one_is_none(copy, tmp_path, capsys, damage):
    file = copy / "release" / "common.pt"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": bytes(range(100, 200))}[damage])
    back = ["--to-hf", "--source", copy, "--target", tmp_path / "new"]
    assert f"{file.parent}, whose common.pt cannot be read" in refusal(tool("convert_hf_teacher"), capsys, *back)
    file.unlink()
    assert TorchDistReader(copy).arguments() == Namespace()


class OfAFork:
    """A class that no list allows."""


def test_arguments_of_a_class_that_is_not_allowed_are_left_out(copy):
    assert TorchDistReader(copy).arguments().num_query_groups == 2
    torch.save({"args": OfAFork()}, copy / "release" / "common.pt")
    assert TorchDistReader(copy).arguments() == Namespace()


def test_reading_arguments_leaves_torchs_list_of_safe_classes_as_it_was(made):
    with torch.serialization.safe_globals([Namespace]):
        before = set(torch.serialization.get_safe_globals())
        TorchDistReader(made).arguments()
        assert set(torch.serialization.get_safe_globals()) == before
    before = set(torch.serialization.get_safe_globals())
    TorchDistReader(made).arguments()
    assert set(torch.serialization.get_safe_globals()) == before


def test_optimizer_states_and_objects_of_others_stay_behind_when_a_language_model_is_taken_out(tmp_path):
    name, scale = "language_model.embedding.word_embeddings.weight", "language_model.decoder.scale"
    state = {name: torch.randn(6, 4), scale: torch.tensor(3.5), f"optimizer.state.exp_avg.{name}": torch.ones(6, 4)}
    objects = {"language_model.decoder._extra_state/shard_0_1": [7], "common_state/shard_0_1": (3,)}
    more = {"vision_model.conv1._extra_state/shard_0_1": [8], "regate.difficulty": (1,)}
    checkpoint.save(state | objects | more, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    (tmp_path / "c" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    run(tool("extract_teacher"), "--source", tmp_path / "c", "--target", tmp_path / "teacher")
    source, found = TorchDistReader(tmp_path / "c"), TorchDistReader(tmp_path / "teacher")
    assert set(found.shapes) == {"embedding.word_embeddings.weight", "decoder.scale"}
    assert torch.equal(found.read("embedding.word_embeddings.weight"), state[name])
    assert found.read("decoder.scale") == 3.5
    common = "common_state/shard_0_1"
    assert set(found.objects) == {"decoder._extra_state/shard_0_1", common}
    assert found.read_object(common) == source.read_object(common)
