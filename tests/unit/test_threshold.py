"""One threshold for the global batch, told by one plain sort of all targets; the same however they lie on planners."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regate_megatron.method.candidates import ceil_share
from regate_megatron.method.threshold import above_threshold

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 5e-324]), st.floats(-1e300, 1e300))
KEYS = st.tuples(*[st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1])] * 2)
GROUPS = st.lists(st.tuples(KEYS, st.lists(SCORES, max_size=7)), min_size=1, max_size=7)
RATIOS = st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])
LEAST = st.sampled_from([None, None, -1.0, 0.0, 1.0, 2.5, 1e301])


class Planners:
    """Several planners in one process, each a thread, which sum what they give."""

    def __init__(self, size: int) -> None:
        self.size, self.given, self.sums = size, [None] * size, 0
        self.barrier = Barrier(size, timeout=60)

    def sum_of(self, rank: int):
        def sum_over_planners(values: torch.Tensor) -> torch.Tensor:
            self.given[rank] = values
            self.barrier.wait()
            total = torch.stack(self.given).sum(dim=0)
            self.sums += rank == 0
            self.barrier.wait()
            return total

        return sum_over_planners


def kept_of(groups, ratio, least=None, size=1) -> tuple[list[list[bool]], int]:
    """What each group keeps, with the groups dealt out over ``size`` planners; and how many sums that took."""
    planners = Planners(size)

    def plan(rank: int) -> list[list[bool]]:
        own = list(range(len(groups)))[rank::size]
        count_G = torch.tensor([len(groups[one][1]) for one in own], dtype=torch.int64)
        kept_X = above_threshold(
            torch.tensor([score for one in own for score in groups[one][1]], dtype=torch.float64),
            count_G,
            ceil_share(ratio, count_G, 2),
            key_G2=torch.tensor([groups[one][0] for one in own], dtype=torch.int64).view(-1, 2),
            order_G=torch.tensor(own, dtype=torch.int64),
            keep_ratio=ratio,
            least_score=least,
            sum_over_planners=planners.sum_of(rank),
        )
        return [part.tolist() for part in kept_X.split(count_G.tolist())]

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(plan, range(size)))
    return [parts[one % size][one // size] for one in range(len(groups))], planners.sums


def by_one_sort(groups, ratio, least=None) -> list[list[bool]]:
    """Slow and obvious: every group's best up to its floor, then one list of all others, sorted, cut off."""
    kept = [[False] * len(scores) for _, scores in groups]
    others = []
    for number, (key, scores) in enumerate(groups):
        best_first = sorted(range(len(scores)), key=lambda place, scores=scores: (-scores[place], place))
        floor = math.ceil(Fraction(str(ratio)) * len(scores) / 2)
        for place in best_first[:floor]:
            kept[number][place] = True
        others += [(-scores[place] + 0.0, place, key, number) for place in best_first[floor:]]
    total = sum(len(scores) for _, scores in groups)
    room = math.ceil(Fraction(str(ratio)) * total) - sum(map(sum, kept))
    for score, place, _, number in sorted(others)[: max(room, 0)]:
        kept[number][place] = least is None or -score > least
    return kept


@settings(deadline=None)
@given(groups=GROUPS, ratio=RATIOS, least=LEAST, size=st.integers(1, 3))
def test_what_each_sample_keeps_is_one_sort_of_the_whole_batch(groups, ratio, least, size):
    assert kept_of(groups, ratio, least, size)[0] == by_one_sort(groups, ratio, least)


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.tuples(KEYS, st.lists(SCORES, max_size=3)), min_size=1, max_size=4).filter(
        lambda groups: sum(len(scores) for _, scores in groups) <= 9
    ),
    ratio=RATIOS,
)
def test_no_set_of_as_many_targets_that_holds_every_floor_scores_more(groups, ratio):
    """Exhaustive: every subset."""
    kept = kept_of(groups, ratio)[0]
    floors = [math.ceil(Fraction(str(ratio)) * len(scores) / 2) for _, scores in groups]
    total = sum(len(scores) for _, scores in groups)
    number = sum(map(sum, kept))
    assert number == max(math.ceil(Fraction(str(ratio)) * total), sum(floors))
    targets = [(group, Fraction(score)) for group, (_, scores) in enumerate(groups) for score in scores]
    flat = [one for group in kept for one in group]
    worth = sum(score for (_, score), one in zip(targets, flat, strict=True) if one)
    for chosen in itertools.combinations(targets, number):
        counts = Counter(group for group, _ in chosen)
        if all(counts[group] >= floor for group, floor in enumerate(floors)):
            assert sum(score for _, score in chosen) <= worth


def test_rows_with_nothing_to_learn_give_their_share_to_rows_that_have():
    easy, hard = ((1, 1), [0.1] * 8), ((2, 2), [3.0] * 8)
    kept = kept_of([easy, hard], 0.5)[0]
    assert [sum(one) for one in kept] == [2, 6]  # the floor of one, and what it gave


def test_ties_are_broken_by_place_then_key_wherever_rows_lie():
    groups = [((2, 0), [1.0] * 4), ((1, 0), [1.0] * 4), ((1, -1), [1.0] * 4)]
    assert kept_of(groups, 0.5)[0] == [[True, True, False, False]] * 3  # no third place before all second ones
    for order in itertools.permutations(range(3)):  # eight of twelve: two third places, of the lower keys
        shuffled = kept_of([groups[one] for one in order], 0.6)[0]
        assert [sum(shuffled[order.index(one)]) for one in range(3)] == [2, 3, 3]


def test_equal_samples_keep_as_many_as_asked_between_them():
    kept = kept_of([((5, 5), [1.0, 1.0])] * 3, 0.5, size=3)[0]
    assert kept == [[True, False]] * 3
    assert sum(map(sum, kept_of([((5, 5), [1.0, 1.0, 1.0])] * 3, 0.5, size=3)[0])) == 5


def test_fewer_run_the_fewer_score_above_the_least():
    groups = [((1, 1), [0.5, 2.0, 3.0, 4.0]), ((2, 2), [0.0, 0.1, 0.2, 0.3])]
    assert [sum(map(sum, kept_of(groups, 0.5, least)[0])) for least in (None, 0.25, 2.5, 9.0)] == [4, 4, 3, 2]


def test_a_batch_without_targets_keeps_none():
    assert kept_of([((1, 1), []), ((2, 2), [])], 0.5)[0] == [[], []]


@pytest.mark.parametrize("size", [1, 4])
def test_a_few_sums_are_enough_where_scores_hardly_repeat(size):
    score = torch.rand(64, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 8
    groups = [((number, number), row.tolist()) for number, row in enumerate(score)]
    kept, sums = kept_of(groups, 0.5, size=size)
    assert sums <= 5 and sum(map(sum, kept)) == 64 * 250
