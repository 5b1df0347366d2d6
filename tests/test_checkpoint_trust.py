"""A checkpoint's index is a pickle; reading one runs nothing but torch's own metadata classes."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from regate_megatron import ReGateError
from regate_megatron.teacher.weights import find_iteration


def _checkpoint(folder, index: bytes):
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").write_bytes(index)
    return folder


class _Runs:
    """What an attacker would put into an index: a call on loading."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_index_of_torch_is_accepted(tmp_path):
    assert find_iteration(_checkpoint(tmp_path, pickle.dumps(Metadata({})))) == tmp_path


def test_index_that_would_run_something_is_refused_and_not_run(tmp_path):
    with pytest.raises(ReGateError, match="untrusted: it would import posix.mkdir"):
        find_iteration(_checkpoint(tmp_path, pickle.dumps(_Runs(tmp_path / "made"))))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["os.system", "io.open", "pickle", "Any"])
def test_index_cannot_reach_what_torch_imports(tmp_path, name):
    module = "torch.distributed.checkpoint.filesystem"
    index = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    index += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
    with pytest.raises(ReGateError, match="untrusted: it would import"):
        find_iteration(_checkpoint(tmp_path, index))


@pytest.mark.parametrize("index", [b"", b"garbage", pickle.dumps(Metadata({}))[:-3]])
def test_damaged_index_is_refused(tmp_path, index):
    with pytest.raises(ReGateError, match="^regate: teacher: given .*unreadable.*; allowed .*; change "):
        find_iteration(_checkpoint(tmp_path, index), "teacher")


@pytest.mark.parametrize("file", ["../__0_0.distcp", "/etc/passwd", "..", "sub/__0_0.distcp"])
def test_index_that_points_out_of_its_folder_is_refused(tmp_path, file):
    index = Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo(file, 0, 1)})
    with pytest.raises(ReGateError, match="untrusted: it points at"):
        find_iteration(_checkpoint(tmp_path, pickle.dumps(index)))


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ReGateError, match="which holds no checkpoint"):
        find_iteration(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    with pytest.raises(ReGateError, match="incomplete or in another format"):
        find_iteration(tmp_path)
