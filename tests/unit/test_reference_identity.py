"""Whose losses a cache holds, the fingerprint of weights, and weights that wait on the host."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.errors import ReGateError
from regate_megatron.teacher.fingerprint import sums_of
from regate_megatron.teacher.manifest import claim, claim_probe, differences, fingerprint, read_manifest, read_probe
from regate_megatron.teacher.offload import Offloaded
from regate_megatron.teacher.source import hash_of_tokenizer

TEACHER = {
    "weights": "00aa",
    "architecture": {"num_layers": 4, "hidden_size": 32},
    "vocab_size": 64,
    "tokenizer": "t1",
    "visual": "drop",
    "dtype": "float32",
}


def test_first_run_names_the_teacher_and_later_ones_agree(tmp_path):
    claim(tmp_path / "cache", TEACHER)
    claim(tmp_path / "cache", json.loads(json.dumps(TEACHER)))
    assert read_manifest(tmp_path / "cache") == TEACHER
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["manifest.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "00bb"}, "weights 00aa, here 00bb"),
        ({"visual": "pad with 0"}, "visual drop, here pad with 0"),
        ({"dtype": "bfloat16"}, "dtype float32, here bfloat16"),
        ({"vocab_size": 80}, "vocab_size 64, here 80"),
        ({"tokenizer": "t2"}, "tokenizer t1, here t2"),
        ({"architecture": {"num_layers": 5, "hidden_size": 32}}, "num_layers 4, here 5"),
    ],
)
def test_another_teacher_is_refused_with_both_fingerprints(tmp_path, change, words):
    claim(tmp_path, TEACHER)
    with pytest.raises(
        ReGateError, match="^regate: --regate-reference-cache: given .*; allowed .*; change "
    ) as refusal:
        claim(tmp_path, {**TEACHER, **change})
    assert words in str(refusal.value)
    assert fingerprint(TEACHER)[:16] in str(refusal.value)
    assert fingerprint({**TEACHER, **change})[:16] in str(refusal.value)


def test_unknown_tokenizer_is_compared_by_its_size_alone(tmp_path):
    claim(tmp_path, {**TEACHER, "tokenizer": None})
    claim(tmp_path, TEACHER)


def test_one_of_many_first_runs_wins(tmp_path):
    refused = []

    def run(number: int) -> None:
        try:
            claim(tmp_path, {**TEACHER, "weights": str(number)})
        except ReGateError:
            refused.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and int(read_manifest(tmp_path)["weights"]) not in refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "with unreadable content"),
        ("{", "with unreadable content"),
        ("[]", "with unreadable content"),
        ('{"format": 3}', "with a wrong checksum"),
        ('{"format": 2, "teacher": {}}', "of format 2; allowed a cache of format 3"),
    ],
)
def test_damaged_or_older_manifest_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ReGateError, match=f"^regate: --regate-reference-cache: given .*manifest.json {words}.*change"):
        claim(tmp_path, TEACHER)


def test_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReGateError, match="^regate: --regate-reference-cache: given"):
        claim(tmp_path / "file" / "cache", TEACHER)


def test_tokenizer_is_known_by_what_its_ids_mean(tmp_path):
    def hashed(vocab=None, model=None):
        return hash_of_tokenizer(SimpleNamespace(**({"vocab": vocab} if vocab else {})), model)

    assert hashed({"a": 0, "b": 1}) == hashed({"b": 1, "a": 0}) != hashed({"a": 1, "b": 0})
    assert hashed() is None and hashed(model=str(tmp_path / "none")) is None and hashed(model=str(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("one")
    first = hashed(model=str(tmp_path))
    assert first == hashed(model=str(tmp_path)) is not None
    (tmp_path / "tokenizer.json").write_text("two")
    assert hashed(model=str(tmp_path)) != first != hashed(model=str(tmp_path / "tokenizer.json"))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.data())
def test_fingerprint_is_the_same_however_a_tensor_is_cut(layers, rows, columns, data):
    shape = (layers, rows, columns)
    whole = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    axis = data.draw(st.integers(0, 2))
    cut = data.draw(st.integers(0, shape[axis]))
    totals = [0, 0]
    for start, stop in ((0, cut), (cut, shape[axis])):
        if start < stop:
            offset = tuple(start if one == axis else 0 for one in range(3))
            parts = sums_of("w", shape, offset, whole.narrow(axis, start, stop - start))
            totals = [(total + part) % 2**64 for total, part in zip(totals, parts, strict=True)]
    assert totals == sums_of("w", shape, (0, 0, 0), whole)


def test_fingerprint_sees_values_places_and_names():
    values = torch.randn(6, 8)
    base = sums_of("w", (6, 8), (0, 0), values)
    assert base[0] != base[1]
    changed = values.clone()
    changed[3, 4] = torch.nextafter(changed[3, 4], torch.tensor(9.0))
    others = [("w", changed), ("w", values.flip(0)), ("w", values.flip(1)), ("v", values), ("w", values.roll(1, 1))]
    for name, other in others:
        assert not set(base) & set(sums_of(name, (6, 8), (0, 0), other))
    vector = torch.arange(5.0)
    assert sums_of("b", (5,), (0,), vector) != sums_of("b", (5,), (0,), vector.flip(0))


def test_fingerprint_is_the_same_on_host_and_device_blocks(monkeypatch):
    values = torch.randn(40, 50)
    expected = sums_of("w", (40, 50), (0, 0), values)
    monkeypatch.setattr("regate_megatron.teacher.fingerprint._BLOCK_IN_CACHE", 130)
    assert sums_of("w", (40, 50), (0, 0), values) == expected


def test_offloaded_weights_leave_and_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight  # tied: one tensor, moved once
    model.register_buffer("shared", torch.ones(1))
    values = [parameter.detach().clone() for parameter in model.parameters()]
    places = {parameter.data_ptr() for parameter in model.parameters()}
    buffer = model.shared.data_ptr()
    offloaded = Offloaded([model])
    assert not offloaded.is_on_device and offloaded.num_bytes == 4 * (16 + 4 + 4)
    host = {parameter.data_ptr() for parameter in model.parameters()}
    assert not host & places, "what lay on the device is still held"
    for _ in range(2):
        offloaded.bring()
        offloaded.bring()  # twice is harmless
        there = {parameter.data_ptr() for parameter in model.parameters()}
        assert not there & host and model[1].weight is model[0].weight
        assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
        offloaded.leave()
        offloaded.leave()
        assert {parameter.data_ptr() for parameter in model.parameters()} == host
    assert model.shared.data_ptr() == buffer
    assert all(np.array_equal(p.detach(), v) for p, v in zip(model.parameters(), values, strict=True))


def test_fixed_row_tells_a_teacher_that_its_names_do_not(tmp_path):
    losses = [3.0, 4.0, 5.0]
    claim_probe(tmp_path, losses, "float32")
    claim_probe(tmp_path, [loss * (1 + 1e-5) for loss in losses], "float32")
    claim_probe(tmp_path, [loss * 1.005 for loss in losses], "bfloat16")
    for other, dtype in (
        ([3.0, 4.0, 5.1], "float32"),
        ([3.0, 4.5, 5.0], "bfloat16"),
        ([3.0, float("nan"), 5.0], "float32"),
    ):
        with pytest.raises(
            ReGateError, match="^regate: --regate-reference-cache: given .*fixed row.*; allowed .*; change "
        ):
            claim_probe(tmp_path, other, dtype)
    assert read_probe(tmp_path) == losses
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(ReGateError, match="probe.json with unreadable"):
        claim_probe(tmp_path, losses, "float32")


def test_losses_that_are_not_finite_are_nobodys_fixed_row(tmp_path):
    claim_probe(tmp_path, [float("inf")], "float32")
    assert read_probe(tmp_path) is None


def test_numbers_are_compared_up_to_the_rounding_of_devices():
    one = {"architecture": {"rotary": {"inv_freq": [1.0, 0.1]}}, "tokenizer": None}
    other = {"architecture": {"rotary": {"inv_freq": [1.0, 0.1 * (1 + 1e-7)]}}, "tokenizer": "t"}
    assert differences(one, other) == []
    other["architecture"]["rotary"]["inv_freq"][1] = 0.1001
    assert differences(one, other) == ["inv_freq [1.0, 0.1], here [1.0, 0.1001]"]


def test_what_only_one_teacher_has_is_a_difference():
    assert differences({"architecture": {"softmax_scale": 0.5}}, {"architecture": {}}) == [
        "softmax_scale 0.5, here None"
    ]
