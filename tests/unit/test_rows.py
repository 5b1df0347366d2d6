"""Microbatches as bytes: what is put in comes out, and bytes that are none are refused, not run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from regate_megatron.errors import ReGateError
from regate_megatron.ranks.rows import Peers, like_at_home, pack, unpack
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.dealing import Dealing
from regate_megatron.step.step import Step


@dataclass
class Pictures:
    """As Megatron-Bridge's batches have them."""

    pixels: torch.Tensor | None
    names: list = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.pixels is None or not hasattr(self, "came"), "a constructor was run"


BATCH = {
    "tokens": torch.arange(6).view(2, 3),
    "loss_mask": torch.tensor([[1.0, 0.0, 1.0]]),
    "image": torch.randn(2, 3, 4, 4).to(torch.bfloat16),
    "attention_mask": torch.ones(1, 1, 3, 3).tril().bool(),
    "max_seqlen": torch.tensor(3, dtype=torch.int32),
    "none at all": torch.empty(0, 5),
    "cu_seqlens_padded": None,
    "__key__": ["one", "zwei ü"],
    "pair": (1, 2.5, True),
    "nested": {"ids": np.arange(3, dtype=np.int16)},
    "raw": b"\x00\xff",
}


def _same(one, other) -> bool:
    if torch.is_tensor(one):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def test_a_microbatch_arrives_as_it_was():
    given = pack(BATCH)
    found, size = unpack(torch.cat([given, pack({"next": 1})]))
    assert size == len(given) and _same(BATCH, found)
    assert unpack(torch.cat([given, pack({"next": 1})])[size:])[0] == {"next": 1}


def test_a_dataclass_arrives_as_one_with_all_it_holds_and_no_constructor_is_run(monkeypatch):
    given = Pictures(torch.arange(4.0), ["one"])
    given.came = 3  # no field
    packed = pack({"visual": given})
    monkeypatch.setattr(Pictures, "__init__", None)
    found = unpack(packed)[0]["visual"]
    assert type(found) is Pictures and _same(vars(found), vars(given))
    home = {"visual": Pictures.__new__(Pictures)}
    assert _same(vars(like_at_home({"visual": found}, home)["visual"]), vars(given))


def test_a_class_that_is_none_here_is_not_looked_for():
    for name in (["torch", "Tensor"], ["no.such.module", "One"], ["os", "system"], [__name__, "BATCH"]):
        with pytest.raises(ValueError, match="which is no dataclass here"):
            unpack(_with_description(["object", *name, []]))


def test_transposed_and_sliced_tensors_arrive_as_they_look():
    whole = torch.arange(24).view(4, 6)
    found, _ = unpack(pack({"t": whole.t()[1:3], "s": whole[:, ::2]}))
    assert torch.equal(found["t"], whole.t()[1:3]) and torch.equal(found["s"], whole[:, ::2])


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ({"visual": object()}, "batch['visual'] under --regate-budget dealt: given builtins.object; allowed tensors"),
        ({"ids": [1, {2}]}, "batch['ids'][1]"),
        ({1: torch.zeros(1)}, "given builtins.dict"),
        ({"names": np.array(["a"])}, "given numpy.ndarray"),
        ({"sparse": torch.eye(2).to_sparse()}, "given torch.Tensor"),
    ],
)
def test_what_has_no_description_is_refused(value, given):
    with pytest.raises(ReGateError) as refusal:
        pack(value)
    assert given in str(refusal.value) and "change the data loader, or --regate-budget" in str(refusal.value)


def _with_description(described) -> torch.Tensor:
    text = json.dumps(described).encode() if not isinstance(described, bytes) else described
    text += b" " * (-len(text) % 16)
    head = torch.tensor([16 + len(text), len(text)]).view(torch.uint8)
    return torch.cat([head, torch.frombuffer(bytearray(text), dtype=torch.uint8)])


@pytest.mark.parametrize(
    "described",
    [
        ["tensor", "int64", [4]],
        ["tensor", "int64", [-1]],
        ["tensor", "int64", [1.5]],
        ["tensor", "load", [0]],
        ["tensor", "nn", [0]],
        ["dict", [["a", ["value", []]]]],
        ["dict", [["a"]]],
        ["call", "print"],
        {},
        b"\x80\x04cos\nsystem\n",
    ],
)
def test_bytes_that_are_no_microbatch_are_refused(described):
    with pytest.raises(ValueError, match="a microbatch"):
        unpack(_with_description(described))


def test_cut_bytes_are_refused():
    given = pack(BATCH)
    for size in (0, 8, 15, 16, 100, len(given) - 1):
        with pytest.raises(ValueError, match="a microbatch"):
            unpack(given[:size])
    with pytest.raises(ValueError, match="that describes"):
        longer = torch.cat([given, torch.zeros(16, dtype=torch.uint8)])
        longer[:8] = torch.tensor([len(longer)]).view(torch.uint8)
        unpack(longer)


def test_a_microbatch_is_put_where_its_rank_has_its_own():
    came = like_at_home({"tokens": torch.ones(2), "name": "a"}, {"tokens": torch.empty(2, device="meta")})
    assert came["tokens"].device.type == "meta" and came["name"] == "a"


def test_a_rank_that_cannot_read_what_came_has_exchanged_all_that_its_peers_wait_for(monkeypatch):
    """With two data iterators (virtual pipeline stages) the peers are in the second exchange by then."""
    topology = Topology(0, 2, False, 1, 2, None, None, None)
    dealing, step = Dealing(topology, None, in_columns=False), Step(0, "sparse", elides=True)
    dealing._peers = object.__new__(Peers)
    vars(dealing._peers).update(_group=None, _rank=0, has_data=True)
    step.batches, exchanged = [[{"a": 1}], [{"a": 2}]], []

    def exchange(out, given, *sizes, group):
        exchanged.append(len(given))
        out.copy_(torch.tensor([0, 32]) if not sizes else torch.zeros(32))

    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    from_DM = np.array([[1], [0]])
    with pytest.raises(ValueError, match="a microbatch of 0 bytes"):
        dealing.exchange(step, from_DM, [{0: pack(batch)} for (batch,) in step.batches])
    assert len(exchanged) == 4
