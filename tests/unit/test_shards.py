"""A step's plans on the way to the device: one copy for all of them, and every field arrives as it was."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from regate_megatron.decoder import Layout, exchange, shard_plans
from regate_megatron.decoder.compaction import _short_packing
from regate_megatron.decoder.cutting import places
from regate_megatron.decoder.experts import Experts
from regate_megatron.decoder.query_scale import QueryScale
from regate_megatron.errors import ReGateError
from regate_megatron.method.plan import MicrobatchPlan, Packing

CPU = torch.device("cpu")
MOVES = {"moves_hidden": True, "moves_tokens": True, "comes_back": True}
LAYOUTS = {
    "one rank": Layout(),
    "CP2 TP2": Layout(cp_size=2, cp_rank=1, sp_size=2, sp_rank=1, hidden_group=object(), context_group=object()),
}


def _plans() -> list[MicrobatchPlan]:
    kept = torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    packing = Packing(torch.tensor([8, 8]), torch.tensor([8, 4]))
    packed = MicrobatchPlan.of(torch.tensor([[True] * 7 + [False] * 6 + [True] * 3]), packing)
    return [MicrobatchPlan.of(kept[0], 12), MicrobatchPlan.of(kept[1], 16), packed, MicrobatchPlan.of(kept[2, :1], 12)]


def _indices(one: exchange.ShardedPlan) -> list[torch.Tensor | None]:
    return [values for each in (one.hidden, one.tokens) for values in each.indices]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_arrives_on_a_device_is_what_was_made_on_the_host(layout, monkeypatch):
    host = shard_plans(_plans(), layout, CPU, **MOVES)
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda values, *_, **__: copies.append(values) or values.clone())
    there = exchange._on_device(shard_plans(_plans(), layout, CPU, **MOVES), CPU)
    monkeypatch.undo()
    assert len(copies) == 1
    for one, other in zip(there, host, strict=True):
        assert (one.hidden is one.tokens) == (layout.sp_size == 1)
        for field in fields(exchange.ShardedPlan):
            got, expected = getattr(one, field.name), getattr(other, field.name)
            if torch.is_tensor(expected):
                assert got.dtype == expected.dtype and torch.equal(got, expected), field.name
            elif not isinstance(expected, exchange.Exchange):
                assert got == expected, field.name
        for got, expected in zip(_indices(one), _indices(other), strict=True):
            assert got is expected is None or torch.equal(got, expected)


def _packed_as(form: str, starts: list[int], *, pads: bool = False) -> PackedSeqParams:
    values = torch.tensor(starts, dtype=torch.int32)
    own = {"cu_seqlens_q_padded": values, "cu_seqlens_kv_padded": values} if pads else {}
    return PackedSeqParams(form, values, values, max_seqlen_q=16, max_seqlen_kv=16, **own)


@pytest.mark.parametrize(("form", "pads", "end"), [("thd", False, 12), ("thd", True, 8), ("sbhd", False, 8)])
def test_a_short_row_of_one_segment_is_covered_to_its_end(form, pads, end):
    """A kernel that takes rows end to end leaves what lies behind the last segment as it finds it."""
    kept = torch.arange(16)[None] < 8
    (plan,) = shard_plans([MicrobatchPlan.of(kept, 12)], Layout(), CPU, **MOVES)
    short = _short_packing(_packed_as(form, [0, 16], pads=pads), plan)
    assert short.cu_seqlens_q.tolist() == [0, end]
    assert (short.cu_seqlens_q_padded is not None) == pads


def test_the_rotary_table_of_scaled_queries_reaches_the_kernel_as_one_block():
    attention = SimpleNamespace(core_attention=None, get_query_key_value_tensors=None)
    attention.forward = lambda *, rotary_pos_emb: rotary_pos_emb
    QueryScale(attention)
    table_KB1D = torch.rand(5, 1, 1, 9)
    rotates_KB1D = attention.forward(rotary_pos_emb=table_KB1D)
    assert torch.equal(rotates_KB1D, table_KB1D[..., :8]) and rotates_KB1D.is_contiguous()


def test_segments_of_which_the_plan_knows_nothing_are_refused():
    (plan,) = shard_plans([MicrobatchPlan.of(torch.arange(16)[None] < 8, 12)], Layout(), CPU, **MOVES)
    with pytest.raises(ReGateError, match="given 2 segments of which the batch says nothing"):
        _short_packing(_packed_as("thd", [0, 4, 16]), plan)


def test_a_padding_mask_that_context_ranks_have_cut_goes_where_kept_positions_go(monkeypatch):
    plan, mask_BS, context = _plans()[0], torch.arange(32).view(2, 16) % 3 == 0, (0, 1)
    config = SimpleNamespace(context_parallel_size=2, sequence_parallel=False)
    experts = Experts(config, [SimpleNamespace(mlp=SimpleNamespace(router=object()))])
    sent, found = {}, {}

    def padding(rank):
        layout = Layout(cp_size=2, cp_rank=rank, hidden_group=object(), context_group=object())
        (own,) = shard_plans([plan], layout, CPU, moves_hidden=False, moves_tokens=True)
        found[rank] = experts.padding(mask_BS[:, places([16], cp_size=2).positions_of(rank)], own)

    for rank in context:
        monkeypatch.setattr(
            exchange.Exchange,
            "_all_to_all",
            lambda _, values, counts, received, rank=rank: (
                sent.update({rank: values.split(counts)}) or values.new_zeros(sum(received))
            ),
        )
        padding(rank)
    for rank in context:
        got = torch.cat([sent[other][rank] for other in context])
        monkeypatch.setattr(exchange.Exchange, "_all_to_all", lambda *_, got=got: got)
        padding(rank)
    is_fill_BK = ~plan.is_kept_BK | mask_BS.gather(1, plan.keep_idx_BK)
    assert bool((is_fill_BK & plan.is_kept_BK).any())
    for rank in context:
        assert torch.equal(found[rank], is_fill_BK[:, places([12], cp_size=2).positions_of(rank)])


def test_a_step_that_elides_nothing_has_nothing_to_lay_out():
    assert shard_plans((), Layout(), CPU, **MOVES) == []
