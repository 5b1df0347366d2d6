"""The study of dealing rows to ranks against exhaustive search, and the report of balance on a few ranks."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import balance
from benchmarks.assigned import assign


def _best(lengths: list[int], num_ranks: int) -> int:
    """The least possible largest sum, by trying every way to deal the rows out evenly."""
    if num_ranks == 1:
        return sum(lengths)
    size, (first, *others) = len(lengths) // num_ranks, lengths
    best = sum(lengths)
    for chosen in itertools.combinations(range(len(others)), size - 1):
        rest = [length for place, length in enumerate(others) if place not in chosen]
        best = min(best, max(first + sum(others[place] for place in chosen), _best(rest, num_ranks - 1)))
    return best


@given(
    st.sampled_from([(1, 4, 1), (2, 2, 1), (3, 2, 1), (2, 3, 7 / 6), (2, 4, 7 / 6), (3, 3, 4 / 3), (4, 2, 1)]),
    st.data(),
)
def test_rows_are_dealt_evenly_and_within_the_proven_bound_of_the_best(case, data):
    """Two rows per rank: optimal; two ranks: within 7/6; three rows per rank: within 4/3 (Michiels et al., 2003)."""
    num_ranks, size, bound = case
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=num_ranks * size, max_size=num_ranks * size))
    rank_N = assign(np.array(lengths), num_ranks)
    assert np.bincount(rank_N, minlength=num_ranks).tolist() == [size] * num_ranks
    largest = max(sum(np.array(lengths)[rank_N == rank]) for rank in range(num_ranks))
    assert largest <= bound * _best(lengths, num_ranks) + 1e-9


def test_rows_that_cannot_be_dealt_evenly_are_refused():
    with pytest.raises(ValueError, match="5 rows for 2 ranks"):
        assign(np.arange(5), 2)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_report_of_balance_on_a_few_ranks(tmp_path, rows):
    lines = []
    mixes = ["--mixes", "captions", "mixed-instruct", "packed-instruct", "--micro-batch-size", str(rows)]
    options = ["--ranks", "4", "--rank-steps", "8", "--rows", "4", "--out", str(tmp_path / "balance.json")]
    results = balance.main([*mixes, *options], lines.append)
    saved = json.loads((tmp_path / "balance.json").read_text())["results"]
    for name, by_ranks in results.items():
        found = by_ranks[4]
        assert saved[name]["4"] == found
        bound = max(1.02, found["balanced"]["achievable"] * 1.001)
        assert 1 <= found["balanced"]["max/mean"] <= bound
        assert found["per-sample"]["kept"] == pytest.approx(0.5, abs=0.02)  # shares round up
        assert 0.25 <= min(found["uniform"]["kept"], found["balanced"]["kept"])
        assert name in lines[0]
    assert results["mixed-instruct"][4]["uniform"]["max/mean"] == 1
