"""Cutting sequences over ranks: Megatron's own zigzag, and every kept position sent exactly once to its new place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.decoder.cutting import places, route


def _zigzag(sequence_L: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Megatron's cut of a batch, written out."""
    chunks = sequence_L.chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


@pytest.mark.parametrize("cp_size, tp_size", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_rows_are_cut_as_megatron_cuts_them(cp_size, tp_size):
    length = 2 * cp_size * tp_size * 3
    found = places(torch.tensor([length]), cp_size=cp_size, tp_size=tp_size)
    for cp_rank in range(cp_size):
        own = _zigzag(torch.arange(length), cp_size, cp_rank) if cp_size > 1 else torch.arange(length)
        for tp_rank, piece in enumerate(own.chunk(tp_size)):
            assert torch.equal(found.positions_of(cp_rank * tp_size + tp_rank), piece)


def test_packed_segments_are_cut_one_by_one():
    found = places(torch.tensor([8, 4]), cp_size=2)
    assert found.positions_of(0).tolist() == [0, 1, 6, 7, 8, 11]
    assert found.positions_of(1).tolist() == [2, 3, 4, 5, 9, 10]


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="CP2 x TP1"):
        places(torch.tensor([6]), cp_size=2)
    with pytest.raises(ValueError, match="CP1 x TP4"):
        places(torch.tensor([6]), cp_size=1, tp_size=4)


@given(
    cp_size=st.sampled_from([1, 2, 3]),
    tp_size=st.sampled_from([1, 2]),
    num_rows=st.integers(1, 3),
    dense=st.integers(2, 4),
    short=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_exchanging_by_route_is_keeping_positions_of_the_whole(cp_size, tp_size, num_rows, dense, short, seed):
    unit, ranks = 2 * cp_size * tp_size, cp_size * tp_size
    generator = torch.Generator().manual_seed(seed)
    dense_places = places(torch.tensor([dense * unit]), cp_size=cp_size, tp_size=tp_size)
    short_places = places(torch.tensor([short * unit]), cp_size=cp_size, tp_size=tp_size)
    keep_BK = torch.randint(0, dense * unit, (num_rows, short * unit), generator=generator)  # repeats: fill does
    whole_LB = torch.randn(dense * unit, num_rows, generator=generator)
    routes = [route(keep_BK, dense_places, short_places, rank=r, num_ranks=ranks) for r in range(ranks)]
    sent = [
        whole_LB[dense_places.positions_of(r)].reshape(-1)[one.send_index_X].split(one.send_counts)
        for r, one in enumerate(routes)
    ]
    for rank, one in enumerate(routes):
        received = torch.cat([sent[source][rank] for source in range(ranks)])
        assert [len(sent[source][rank]) for source in range(ranks)] == one.receive_counts
        short_X = torch.full((one.short_size,), torch.nan).scatter(0, one.receive_index_X, received)
        expected_KB = whole_LB.gather(0, keep_BK.t())[short_places.positions_of(rank)]
        assert torch.equal(short_X.view(-1, num_rows), expected_KB)
