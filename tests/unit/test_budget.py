"""Budgets against plain exact arithmetic, over simulated data-parallel ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from regate_megatron.method.budget import (
    Alignment,
    align_up,
    length_step,
    per_sample_lengths,
    uniform_lengths,
)
from regate_megatron.method.candidates import Candidates, Sort, ceil_share
from tests.unit.ranks import over_ranks

RATIOS = st.one_of(
    st.sampled_from(["0.1", "0.2", "0.3", "0.5", "0.7", "0.9", "1.0", "0.01", "0.29", "0.57", "1e-05"]),
    st.integers(1, 1000).map(lambda thousandths: repr(thousandths / 1000)),
)
MULTIPLES = st.sampled_from([1, 2, 4, 6, 8])
EXTRAS = st.sampled_from([None, 1, 2, 4, 6, 8])


def _share(ratio: str, count: int, divisor: int = 1) -> int:
    """``ceil(ratio·count/divisor)`` of the ratio as it is written."""
    return math.ceil(Fraction(ratio) * count / divisor)


@st.composite
def steps(draw):
    """Per rank its rows as (context, targets, dense length), of equal dense length within a microbatch."""
    num_ranks, microbatches, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    alike = draw(st.booleans())
    common = draw(st.integers(1, 80))
    least, most = draw(st.sampled_from([(0.0, 1.0), (0.4, 0.5)]))  # contexts of rows: any, or much alike
    ranks = []
    for _ in range(num_ranks):
        mine = []
        for _ in range(microbatches):
            dense = common if alike else draw(st.integers(1, 80))
            for _ in range(rows):
                context = draw(st.integers(int(least * dense), int(most * dense)))
                mine.append((context, draw(st.integers(0, dense - context)), dense))
        ranks.append(mine)
    return ranks, rows


def _demand(mine, rows, ratio):
    context, targets, dense = torch.tensor(mine).unbind(dim=1)
    return _candidates(context, targets, torch.arange(len(mine)), dense[::rows], float(ratio))


def _candidates(always_R, count_G, row_G, dense_M, keep_ratio):
    return Candidates(
        always_R=always_R,
        dense_M=dense_M,
        key_M=torch.arange(len(dense_M)),
        sorts=(Sort(count_G=count_G, row_G=row_G, keep_ratio=keep_ratio),),
    )


def _budgets(ranks, rows, *, kind, ratio, layout=1, extra=None):
    """Per rank the length and the kept targets of each row."""

    def work(rank, all_gather):
        demand, alignment = _demand(ranks[rank], rows, ratio), Alignment(layout, extra)
        if kind == "uniform":
            length_M, num_keep_R = uniform_lengths(demand, alignment, all_gather)
        else:
            length_M, num_keep_R = per_sample_lengths(demand, alignment)
        assert length_M.dtype == num_keep_R.dtype == torch.int64
        return length_M.repeat_interleave(rows).tolist(), num_keep_R.tolist()

    return over_ranks(len(ranks), work)


def _aligned(length: int, step: int) -> int:
    while length % step or length == 0:
        length += 1
    return length


def _step(dense: int, extra: int | None) -> int:
    return extra or max(power for power in (1, 2, 4) if power == 1 or power <= dense / 32)


@given(ratio=RATIOS, counts=st.lists(st.integers(0, 100_000), min_size=1, max_size=5), divisor=st.sampled_from([1, 2]))
def test_a_share_is_rounded_up_exactly_as_the_ratio_is_written(ratio, counts, divisor):
    got = ceil_share(float(ratio), torch.tensor(counts), divisor)
    assert got.dtype == torch.int64
    assert got.tolist() == [_share(ratio, count, divisor) for count in counts]


@pytest.mark.parametrize(
    ("ratio", "count", "kept"), [(0.1, 10, 1), (0.1, 11, 2), (0.7, 10, 7), (0.57, 100, 57), (0.29, 100, 29), (1, 7, 7)]
)
def test_a_share_that_is_whole_is_not_rounded_up_for_a_float_error(ratio, count, kept):
    assert ceil_share(ratio, torch.tensor([count])).tolist() == [kept]


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(1 / 3, 4096), (2 / 3, 4096), (0.1 + 0.2, 4096), (0.12345678901234568, 1_000_000), (1e-20, 1)],
)
def test_a_ratio_of_many_digits_does_not_overflow(ratio, count):
    assert ceil_share(ratio, torch.tensor([count])).tolist() == [_share(repr(ratio), count)]


def test_the_share_of_no_rows_is_empty():
    assert ceil_share(0.5, torch.zeros(0, dtype=torch.int64)).tolist() == []


@given(steps(), RATIOS, MULTIPLES, EXTRAS)
def test_per_sample_gives_each_row_its_context_and_its_share(step, ratio, layout, extra):
    ranks, rows = step
    budgets = _budgets(ranks, rows, kind="per-sample", ratio=ratio, layout=layout, extra=extra)
    for mine, (lengths, kept) in zip(ranks, budgets, strict=True):
        assert kept == [_share(ratio, targets) for _, targets, _ in mine]
        for start in range(0, len(mine), rows):
            group = mine[start : start + rows]
            dense = group[0][2]
            longest = max(context + _share(ratio, targets) for context, targets, _ in group)
            expected = min(_aligned(longest, math.lcm(layout, _step(dense, extra))), dense)
            assert lengths[start : start + rows] == [expected] * rows


def _uniform_length(rows, ratio: str) -> int:
    """The larger of the mean ask over the global batch, rounded up, and the largest floor; before alignment."""
    mean_ask = Fraction(sum(context + _share(ratio, targets) for context, targets, _ in rows), len(rows))
    return max(math.ceil(mean_ask), *(context + _share(ratio, targets, 2) for context, targets, _ in rows), 0)


@given(steps(), RATIOS, MULTIPLES, EXTRAS)
def test_uniform_is_the_formula_over_all_ranks(step, ratio, layout, extra):
    ranks, rows = step
    everyone = [row for mine in ranks for row in mine]
    coarse = _step(max(dense for _, _, dense in everyone), extra)
    common = _aligned(_uniform_length(everyone, ratio), coarse)
    length = _aligned(common, math.lcm(layout, coarse))
    budgets = _budgets(ranks, rows, kind="uniform", ratio=ratio, layout=layout, extra=extra)
    for mine, (lengths, kept) in zip(ranks, budgets, strict=True):
        assert lengths == [min(length, dense) for _, _, dense in mine]
        assert kept == [min(targets, min(common, dense) - context) for context, targets, dense in mine]


@given(steps(), RATIOS, st.sampled_from(["uniform", "per-sample"]), EXTRAS)
def test_every_layout_keeps_the_same_number_of_targets(step, ratio, kind, extra):
    ranks, rows = step
    plain, slices = (_budgets(ranks, rows, kind=kind, ratio=ratio, layout=layout, extra=extra) for layout in (1, 6))
    assert [kept for _, kept in plain] == [kept for _, kept in slices]


@given(steps(), RATIOS, st.sampled_from(["uniform", "per-sample"]), MULTIPLES)
def test_lengths_are_aligned_unless_dense_and_hold_every_row_down_to_its_floor(step, ratio, kind, layout):
    ranks, rows = step
    for mine, (lengths, kept) in zip(ranks, _budgets(ranks, rows, kind=kind, ratio=ratio, layout=layout), strict=True):
        for (context, targets, dense), length, num_keep in zip(mine, lengths, kept, strict=True):
            assert 1 <= length <= dense
            assert length % layout == 0 or length == dense
            assert context + num_keep <= length
            assert _share(ratio, targets, 2) <= num_keep <= targets


@given(steps(), RATIOS, st.randoms(use_true_random=False))
def test_uniform_does_not_depend_on_which_rank_holds_which_row(step, ratio, order):
    ranks, _ = step
    everyone = [row for mine in ranks for row in mine]
    assume(len({dense for _, _, dense in everyone}) == 1)
    before = _budgets(ranks, 1, kind="uniform", ratio=ratio)
    kept = {row: count for mine, b in zip(ranks, before, strict=True) for row, count in zip(mine, b[1], strict=True)}
    order.shuffle(everyone)
    size = len(ranks[0])
    dealt = [everyone[start : start + size] for start in range(0, len(everyone), size)]
    alone = _budgets([everyone], 1, kind="uniform", ratio=ratio)
    for spread, budgets in ((dealt, _budgets(dealt, 1, kind="uniform", ratio=ratio)), ([everyone], alone)):
        for mine, (lengths, counts) in zip(spread, budgets, strict=True):
            assert set(lengths) == {before[0][0][0]}
            assert counts == [kept[row] for row in mine]


@given(steps(), st.sampled_from(["uniform", "per-sample"]))
def test_a_keep_ratio_of_one_keeps_every_target(step, kind):
    ranks, rows = step
    for mine, (_, kept) in zip(ranks, _budgets(ranks, rows, kind=kind, ratio="1.0"), strict=True):
        if kind == "uniform" and len({context + targets for context, targets, _ in sum(ranks, [])}) > 1:
            continue  # the mean of the asks may be less than what the longest row asks
        assert kept == [targets for _, targets, _ in mine]


def test_uniform_gives_rows_with_room_more_of_their_own_targets():
    ranks = [[(10, 10, 20)], [(2, 10, 20)]]  # asks 15 and 7, mean 11; floors 13 and 5
    assert _budgets(ranks, 1, kind="uniform", ratio="0.5") == [([13], [3]), ([13], [10])]


def test_uniform_rounds_a_mean_that_is_not_whole_up():
    budgets = _budgets([[(2, 4, 20)], [(2, 5, 20)]], 1, kind="uniform", ratio="0.5")  # asks 4 and 5, floors 3 and 4
    assert budgets == [([5], [3]), ([5], [3])]


def test_what_the_layout_adds_to_the_common_length_is_fill():
    budgets = _budgets([[(2, 10, 20)], [(2, 10, 20)]], 1, kind="uniform", ratio="0.5", layout=8)  # ask 7 each
    assert budgets == [([8], [5]), ([8], [5])]


def test_a_packed_row_asks_for_the_sum_of_what_its_samples_ask_for():
    """Two rows of samples with 3, 5 and 0, 7 targets; the shares of 3 and 5 round up one by one."""
    row_G, targets_G = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 5, 0, 7])
    demand = _candidates(torch.tensor([2, 1]), targets_G, row_G, torch.tensor([10, 10]), 0.5)
    assert (demand.ask_G.tolist(), demand.floor_G.tolist()) == ([2, 3, 0, 4], [1, 2, 0, 2])
    assert (demand.ask_R.tolist(), demand.floor_R.tolist(), demand.full_R.tolist()) == ([7, 5], [5, 3], [10, 8])


@given(st.integers(0, 500), st.integers(1, 64))
def test_aligning_up_gives_the_next_multiple(length, multiple):
    got = align_up(length, multiple)
    assert got % multiple == 0 and length <= got < length + multiple


@pytest.mark.parametrize(
    ("length", "dense", "layout", "extra", "expected"),
    [
        *((5, 100, 4, 1, 8), (5, 100, 4, 6, 12), (8, 100, 8, 8, 8), (5, 7, 4, 1, 7), (0, 100, 1, 1, 1)),
        *((0, 100, 16, 1, 16), (5, 100, 1, None, 6), (5, 100, 3, None, 6), (5, 15, 1, None, 5)),
    ],
)
def test_alignment_meets_both_multiples_and_stops_at_the_dense_length(length, dense, layout, extra, expected):
    assert Alignment(layout, extra).align(length, dense) == expected


@given(st.integers(1, 10**6))
def test_by_default_at_most_64_lengths_occur_under_one_dense_length(dense):
    step = length_step(dense)
    assert step.bit_count() == 1 and (step == 1 or step <= dense / 32) and dense / 64 < step
    assert len({Alignment().align(length, dense) for length in range(1, dense + 1, max(1, step // 2))}) <= 64
