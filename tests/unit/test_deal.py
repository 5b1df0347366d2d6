"""Microbatches dealt to ranks: against every possible deal, and what holds of any."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.deal import at_best, by_differencing, by_turns, deal


@st.composite
def batches(draw, max_ranks=5, max_micro=5, lengths=12):
    """(lengths [D, M], keys [D, M])."""
    shape = tuple(draw(st.integers(1, most)) for most in (max_ranks, max_micro))
    size = shape[0] * shape[1]
    length_N = draw(st.lists(st.integers(1, lengths), min_size=size, max_size=size))
    return np.array(length_N).reshape(shape), np.array(draw(st.permutations(range(size)))).reshape(shape)


@given(batches(), st.booleans())
def test_every_microbatch_is_dealt_once_and_the_totals_are_those_of_what_is_dealt(case, in_columns):
    length_DM, key_DM = case
    dealt = deal(length_DM, key_DM, in_columns=in_columns)
    assert sorted(dealt.from_DM.ravel()) == list(range(length_DM.size))
    there_DM = length_DM.ravel()[dealt.from_DM]
    assert (dealt.total_D == there_DM.sum(axis=1)).all()
    assert (dealt.longest_M == there_DM.max(axis=0)).all()


@given(batches())
def test_microbatches_that_run_as_well_at_home_stay_there(case):
    length_DM, key_DM = case
    at_home = length_DM.sum(axis=1).max()
    dealt = deal(length_DM, key_DM, in_columns=False)
    assert dealt.total_D.max() <= at_home
    assert (dealt.total_D.max() == at_home) == (dealt.num_moved == 0)


@given(batches(max_ranks=4, max_micro=3))
def test_a_deal_follows_the_microbatches_wherever_they_lie(case):
    """Another order of the same ones: the same lengths for everybody."""
    length_DM, key_DM = case
    shuffled_N = np.random.default_rng(length_DM.sum()).permutation(length_DM.size)
    places = (length_DM.ravel()[shuffled_N], key_DM.ravel()[shuffled_N])
    there = deal(*(values_N.reshape(length_DM.shape) for values_N in places))
    here = deal(length_DM, key_DM)
    if "home" not in (here.method, there.method):
        assert sorted(here.total_D) == sorted(there.total_D) and (here.longest_M == there.longest_M).all()


def _every_deal(length_N, ranks):
    """The totals of each deal of as many to every rank."""
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
    length_DM = np.array(length_N).reshape(ranks, micro)
    dealt = deal(length_DM, np.arange(length_DM.size).reshape(length_DM.shape))
    best = min(max(totals) for totals in _every_deal(length_N, ranks))
    assert at_best(length_DM)[0] <= best <= dealt.total_D.max() <= bound * best + 1e-9


@given(batches(max_ranks=4, max_micro=3, lengths=9))
def test_no_deal_waits_less_in_its_microbatches(case):
    """The k-th longest of any deal is as long as the one with (k-1)·D before it."""
    length_DM, key_DM = case
    dealt = deal(length_DM, key_DM)
    best = np.sort(length_DM.ravel())[::-1][:: len(length_DM)].tolist()
    assert at_best(length_DM)[1] == sum(best) == dealt.longest_M.sum()
    assert sorted(dealt.longest_M)[::-1] == best or dealt.method == "home"


def test_microbatches_of_one_length_stay_where_they_are():
    dealt = deal(np.full((4, 3), 7), np.arange(12).reshape(4, 3))
    assert dealt.method == "home" and dealt.from_DM.tolist() == np.arange(12).reshape(4, 3).tolist()
    assert dealt.total_D.tolist() == [21] * 4 and dealt.longest_M.tolist() == [7] * 3


@given(batches(max_ranks=4, max_micro=4))
def test_where_totals_count_alone_microbatches_swap_columns_and_the_slowest_rank_is_no_slower(case):
    across = deal(*case, in_columns=False)
    assert across.total_D.max() <= deal(*case).total_D.max()


def test_an_outlier_is_made_up_for_across_columns():
    """The rank with the 9 gets all three 1s, which lie in one column."""
    length_DM = np.array([[9, 2, 2, 1], [3, 2, 2, 1], [3, 2, 2, 1]])
    key_DM = np.arange(12).reshape(3, 4)
    assert deal(length_DM, key_DM).total_D.max() == 14
    across = deal(length_DM, key_DM, in_columns=False)
    assert across.total_D.max() == 12 == at_best(length_DM)[0]


def test_what_no_deal_falls_below_counts_long_ones_that_must_meet_and_steps_of_length():
    assert at_best(np.array([[9, 1, 1], [1, 1, 1]])) == (11, 9 + 1 + 1)  # who has the long one has two others
    assert at_best(np.array([[8, 8, 1], [8, 1, 1]])) == (17, 8 + 8 + 1)  # two of three long ones meet
    assert at_best(np.array([[4, 4], [4, 8], [4, 4]])) == (12, 8 + 4)  # the mean is 28/3, its next multiple of 4 is 12
    assert at_best(np.array([[6, 2], [2, 2]])) == (8, 6 + 2)


def test_only_the_microbatches_that_differ_move():
    """Ranks 0 and 1 exchange one each; the others keep theirs."""
    length_DM = np.array([[9, 9, 5], [1, 1, 5], [9, 1, 5], [1, 9, 5]])
    dealt = deal(length_DM, np.arange(12).reshape(4, 3))
    assert (dealt.total_D == 15).all() and dealt.num_moved == 2


def test_the_shortest_microbatches_are_first_and_last():
    length_DM = np.array([[10, 20, 30, 40, 50], [11, 21, 31, 41, 51]])
    dealt = deal(length_DM, np.arange(10).reshape(2, 5))
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
