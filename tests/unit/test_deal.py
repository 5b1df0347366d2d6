"""Rows dealt to ranks and microbatches: against every possible deal, and what holds of any."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.deal import at_best, by_differencing, by_turns, deal


@st.composite
def batches(draw, max_ranks=5, max_micro=5, max_rows=3, lengths=12):
    """(lengths [D, R], keys [D, R], rows of a microbatch, forms [D, R])."""
    ranks, micro, rows = (draw(st.integers(1, most)) for most in (max_ranks, max_micro, max_rows))
    shape = ranks, micro * rows
    size = ranks * micro * rows
    length_N = draw(st.lists(st.integers(1, lengths), min_size=size, max_size=size))
    key_N = draw(st.permutations(range(size)))
    form_G = draw(st.lists(st.integers(0, 1), min_size=ranks * micro, max_size=ranks * micro))
    form_DR = np.repeat(form_G, rows).reshape(shape)
    return np.array(length_N).reshape(shape), np.array(key_N).reshape(shape), rows, form_DR


def _groups(values_DR, dealt, rows):
    """Values as they lie after the deal; [D, M, b]."""
    return values_DR.ravel()[dealt.from_DR].reshape(len(values_DR), -1, rows)


@given(batches(), st.booleans())
def test_every_row_is_dealt_once_and_forms_stay_together(case, in_columns):
    length_DR, key_DR, rows, form_DR = case
    dealt = deal(length_DR, key_DR, rows=rows, form_DR=form_DR, in_columns=in_columns)
    assert sorted(dealt.from_DR.ravel()) == list(range(length_DR.size))
    form_DMb = _groups(form_DR, dealt, rows)
    assert (form_DMb == form_DMb[..., :1]).all()


@given(batches(), st.booleans())
def test_the_totals_are_those_of_the_rows_dealt(case, in_columns):
    length_DR, key_DR, rows, form_DR = case
    dealt = deal(length_DR, key_DR, rows=rows, form_DR=form_DR, in_columns=in_columns)
    length_DM = _groups(length_DR, dealt, rows).max(axis=2)
    assert (dealt.total_D == length_DM.sum(axis=1) * rows).all()
    assert (dealt.longest_M == length_DM.max(axis=0)).all()


@given(batches(max_rows=1))
def test_rows_that_run_as_well_at_home_stay_there(case):
    length_DR, key_DR, _, _ = case
    at_home = length_DR.sum(axis=1).max()
    dealt = deal(length_DR, key_DR, in_columns=False)
    assert dealt.total_D.max() <= at_home
    assert (dealt.total_D.max() == at_home) == (dealt.num_moved == 0)


@given(batches(max_ranks=4, max_micro=3, max_rows=1))
def test_a_deal_follows_the_rows_wherever_they_lie(case):
    """Another order of the same rows: the same lengths for everybody."""
    length_DR, key_DR, _, _ = case
    shuffled_N = np.random.default_rng(length_DR.sum()).permutation(length_DR.size)
    places = (length_DR.ravel()[shuffled_N], key_DR.ravel()[shuffled_N])
    there = deal(*(values_N.reshape(length_DR.shape) for values_N in places))
    here = deal(length_DR, key_DR)
    if "home" not in (here.method, there.method):
        assert sorted(here.total_D) == sorted(there.total_D) and (here.longest_M == there.longest_M).all()


def _every_deal(length_N, ranks):
    """The totals of each deal of as many rows to every rank."""
    micro = len(length_N) // ranks

    def go(left, done):
        if not left:
            yield done
            return
        for others in itertools.combinations(left[1:], micro - 1):
            own = (left[0], *others)
            rest = [one for one in left if one not in own]
            yield from go(rest, [*done, own])

    for groups in go(list(range(len(length_N))), []):
        yield [sum(length_N[one] for one in group) for group in groups]


@given(
    st.sampled_from([(1, 4, 1), (2, 2, 1), (3, 2, 1), (2, 3, 7 / 6), (2, 4, 7 / 6), (3, 3, 4 / 3), (4, 2, 1)]),
    st.data(),
)
def test_the_slowest_rank_is_within_the_proven_bound_of_the_best_of_every_possible_deal(case, data):
    """Two microbatches: optimal; two ranks: within 7/6; three microbatches: within 4/3 (Michiels et al., 2003)."""
    ranks, micro, bound = case
    length_N = data.draw(st.lists(st.integers(1, 50), min_size=ranks * micro, max_size=ranks * micro))
    length_DR = np.array(length_N).reshape(ranks, micro)
    dealt = deal(length_DR, np.arange(length_DR.size).reshape(length_DR.shape))
    best = min(max(totals) for totals in _every_deal(length_N, ranks))
    assert at_best(length_DR)[0] <= best <= dealt.total_D.max() <= bound * best + 1e-9


@given(batches(max_ranks=4, max_micro=3, max_rows=2, lengths=9))
def test_no_deal_waits_less_in_its_microbatches(case):
    """The k-th longest microbatch of any deal is as long as the row with (k-1)·D·b rows before it."""
    length_DR, key_DR, rows, _ = case
    dealt = deal(length_DR, key_DR, rows=rows)
    falling_N = np.sort(length_DR.ravel())[::-1]
    assert rows > 1 or at_best(length_DR)[1] == falling_N[:: len(length_DR)].sum() <= dealt.longest_M.sum()
    assert sorted(dealt.longest_M)[::-1] == falling_N[:: len(length_DR) * rows].tolist() or dealt.method == "home"
    if dealt.method == "home":
        assert dealt.longest_M.sum() <= falling_N[:: len(length_DR) * rows].sum()


def test_rows_of_one_length_stay_where_they_are():
    dealt = deal(np.full((4, 3), 7), np.arange(12).reshape(4, 3))
    assert dealt.method == "home" and dealt.from_DR.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert dealt.total_D.tolist() == [21] * 4 and dealt.longest_M.tolist() == [7] * 3


@given(batches(max_ranks=4, max_micro=4, max_rows=2))
def test_where_totals_count_alone_rows_swap_columns_and_the_slowest_rank_is_no_slower(case):
    length_DR, key_DR, rows, form_DR = case
    in_columns = deal(length_DR, key_DR, rows=rows, form_DR=form_DR)
    across = deal(length_DR, key_DR, rows=rows, form_DR=form_DR, in_columns=False)
    assert across.total_D.max() <= in_columns.total_D.max()


def test_an_outlier_is_made_up_for_across_columns():
    """The rank with the 9 gets all three 1s, which lie in one column."""
    length_DR = np.array([[9, 2, 2, 1], [3, 2, 2, 1], [3, 2, 2, 1]])
    key_DR = np.arange(12).reshape(3, 4)
    assert deal(length_DR, key_DR).total_D.max() == 14
    across = deal(length_DR, key_DR, in_columns=False)
    assert across.total_D.max() == 12 == at_best(length_DR)[0]


def test_what_no_deal_falls_below_counts_long_rows_that_must_meet_and_steps_of_length():
    assert at_best(np.array([[9, 1, 1], [1, 1, 1]])) == (11, 9 + 1 + 1)  # who has the long one has two others
    assert at_best(np.array([[8, 8, 1], [8, 1, 1]])) == (17, 8 + 8 + 1)  # two of three long ones meet
    assert at_best(np.array([[4, 4], [4, 8], [4, 4]])) == (12, 8 + 4)  # the mean is 28/3, its next multiple of 4 is 12
    assert at_best(np.array([[6, 2], [2, 2]])) == (8, 6 + 2)


def test_only_the_rows_that_differ_move():
    """Ranks 0 and 1 exchange one row each; the others keep theirs."""
    length_DR = np.array([[9, 9, 5], [1, 1, 5], [9, 1, 5], [1, 9, 5]])
    dealt = deal(length_DR, np.arange(12).reshape(4, 3))
    assert (dealt.total_D == 15).all() and dealt.num_moved == 2


def test_the_shortest_microbatches_are_first_and_last():
    length_DR = np.array([[10, 20, 30, 40, 50], [11, 21, 31, 41, 51]])
    dealt = deal(length_DR, np.arange(10).reshape(2, 5))
    assert dealt.longest_M.tolist() == [11, 31, 51, 41, 21]


def test_each_method_wins_where_it_is_better():
    rng, wins = np.random.default_rng(3), {"turns": 0, "differencing": 0}
    for _ in range(200):
        length_MD = -np.sort(-rng.lognormal(5, 1, (5, 4)).astype(int).ravel()).reshape(5, 4)
        slowest = [
            np.take_along_axis(length_MD, of(length_MD), axis=1).sum(axis=0).max() for of in (by_turns, by_differencing)
        ]
        wins["turns"] += slowest[0] < slowest[1]
        wins["differencing"] += slowest[1] < slowest[0]
    assert min(wins.values()) > 0


def test_rows_that_do_not_fill_microbatches_are_refused():
    with pytest.raises(ValueError, match="no multiple of the 2 rows"):
        deal(np.ones((1, 4), int), np.zeros((1, 4), int), rows=2, form_DR=np.array([[0, 1, 1, 1]]))
