"""Budgets against plain exact arithmetic, over simulated data-parallel ranks."""

from __future__ import annotations

import math
import threading
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from regate_megatron.budget import align_length, align_up, ceil_share, plan_budget

RATIOS = st.one_of(
    st.sampled_from(["0.1", "0.2", "0.3", "0.5", "0.7", "0.9", "1.0", "0.01", "0.29", "0.57", "1e-05"]),
    st.integers(1, 1000).map(lambda thousandths: repr(thousandths / 1000)),
)


def _share(ratio: str, count: int, divisor: int = 1) -> int:
    """``ceil(ratio·count/divisor)`` of the ratio as it is written."""
    return math.ceil(Fraction(ratio) * count / divisor)


class Ranks:
    """Runs one function per simulated data-parallel rank, in threads that meet at every reduction."""

    def __init__(self, count: int) -> None:
        self._meeting, self._values = threading.Barrier(count, timeout=30), [None] * count
        self.calls = [0] * count

    def all_reduce_of(self, rank: int):
        def all_reduce(values, op):
            assert values.dtype == torch.int64 and values.dim() == 1
            self.calls[rank] += 1
            self._values[rank] = values
            self._meeting.wait()
            stacked = torch.stack(self._values)
            self._meeting.wait()
            return stacked.sum(dim=0) if op == "sum" else stacked.amax(dim=0)

        return all_reduce

    def run(self, work) -> list:
        results, errors = [None] * len(self.calls), []

        def one(rank):
            try:
                results[rank] = work(rank, self.all_reduce_of(rank))
            except Exception as error:
                errors.append(error)
                self._meeting.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def _no_communication(values, op):
    raise AssertionError("this budget needs no other rank")


@st.composite
def steps(draw):
    """Per rank its rows as (context, targets, dense length), of equal dense length within a microbatch."""
    num_ranks, microbatches, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    alike = draw(st.booleans())
    common = draw(st.integers(1, 40))
    least, most = draw(st.sampled_from([(0.0, 1.0), (0.4, 0.5)]))  # contexts of rows: any, or much alike
    ranks = []
    for _ in range(num_ranks):
        mine = []
        for _ in range(microbatches):
            dense = common if alike else draw(st.integers(1, 40))
            for _ in range(rows):
                context = draw(st.integers(int(least * dense), int(most * dense)))
                mine.append((context, draw(st.integers(0, dense - context)), dense))
        ranks.append(mine)
    return ranks, rows


def _budgets(ranks, rows, *, kind, ratio, multiple=1, extra_multiple=1):
    meeting = Ranks(len(ranks))

    def work(rank, all_reduce):
        context, targets, dense = torch.tensor(ranks[rank]).unbind(dim=1)
        return plan_budget(
            context,
            targets,
            dense,
            kind=kind,
            keep_ratio=float(ratio),
            multiple=multiple,
            extra_multiple=extra_multiple,
            rows_per_microbatch=rows,
            all_reduce=all_reduce if kind == "uniform" else _no_communication,
        )

    return meeting.run(work)


def _aligned(length: int, step: int) -> int:
    while length % step or length == 0:
        length += 1
    return length


MULTIPLES = st.sampled_from([1, 2, 4, 6, 8])


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


@given(steps(), RATIOS, MULTIPLES, MULTIPLES)
def test_per_sample_gives_each_row_its_context_and_its_share(step, ratio, multiple, extra):
    ranks, rows = step
    budgets = _budgets(ranks, rows, kind="per-sample", ratio=ratio, multiple=multiple, extra_multiple=extra)
    for mine, budget in zip(ranks, budgets, strict=True):
        assert budget.num_keep_R.tolist() == [_share(ratio, targets) for _, targets, _ in mine]
        for start in range(0, len(mine), rows):
            group = mine[start : start + rows]
            longest = max(context + _share(ratio, targets) for context, targets, _ in group)
            expected = min(_aligned(longest, math.lcm(multiple, extra)), group[0][2])
            assert budget.length_R[start : start + rows].tolist() == [expected] * rows


def _uniform_length(rows, ratio: str) -> int:
    """The larger of the mean ask over the global batch, rounded up, and the largest floor; before alignment."""
    mean_ask = Fraction(sum(context + _share(ratio, targets) for context, targets, _ in rows), len(rows))
    return max(math.ceil(mean_ask), *(context + _share(ratio, targets, 2) for context, targets, _ in rows), 0)


@given(steps(), RATIOS, MULTIPLES, MULTIPLES)
def test_uniform_is_the_formula_over_all_ranks(step, ratio, multiple, extra):
    ranks, rows = step
    everyone = [row for mine in ranks for row in mine]
    length = _aligned(_uniform_length(everyone, ratio), math.lcm(multiple, extra))
    budgets = _budgets(ranks, rows, kind="uniform", ratio=ratio, multiple=multiple, extra_multiple=extra)
    for mine, budget in zip(ranks, budgets, strict=True):
        assert budget.length_R.tolist() == [min(length, dense) for _, _, dense in mine]
        expected = [min(targets, min(length, dense) - context) for context, targets, dense in mine]
        assert budget.num_keep_R.tolist() == expected


@given(steps(), RATIOS, st.sampled_from(["uniform", "per-sample"]), MULTIPLES)
def test_lengths_are_aligned_unless_dense_and_hold_every_row_down_to_its_floor(step, ratio, kind, multiple):
    ranks, rows = step
    for mine, budget in zip(ranks, _budgets(ranks, rows, kind=kind, ratio=ratio, multiple=multiple), strict=True):
        facts = zip(mine, budget.length_R.tolist(), budget.num_keep_R.tolist(), strict=True)
        for (context, targets, dense), length, num_keep in facts:
            assert 1 <= length <= dense
            assert length % multiple == 0 or length == dense
            assert context + num_keep <= length
            assert _share(ratio, targets, 2) <= num_keep <= targets


@given(steps(), RATIOS, st.randoms(use_true_random=False))
def test_uniform_does_not_depend_on_which_rank_holds_which_row(step, ratio, order):
    ranks, _ = step
    everyone = [row for mine in ranks for row in mine]
    assume(len({dense for _, _, dense in everyone}) == 1)
    before = _budgets(ranks, 1, kind="uniform", ratio=ratio)
    held = zip(ranks, before, strict=True)
    kept = {row: count for mine, b in held for row, count in zip(mine, b.num_keep_R.tolist(), strict=True)}
    order.shuffle(everyone)
    size = len(ranks[0])
    dealt = [everyone[start : start + size] for start in range(0, len(everyone), size)]
    alone = _budgets([everyone], 1, kind="uniform", ratio=ratio)
    for spread, budgets in ((dealt, _budgets(dealt, 1, kind="uniform", ratio=ratio)), ([everyone], alone)):
        for mine, budget in zip(spread, budgets, strict=True):
            assert set(budget.length_R.tolist()) == {int(before[0].length_R[0])}
            assert budget.num_keep_R.tolist() == [kept[row] for row in mine]


@given(steps(), st.sampled_from(["uniform", "per-sample"]))
def test_a_keep_ratio_of_one_keeps_every_target(step, kind):
    ranks, rows = step
    for mine, budget in zip(ranks, _budgets(ranks, rows, kind=kind, ratio="1.0"), strict=True):
        if kind == "uniform" and len({context + targets for context, targets, _ in sum(ranks, [])}) > 1:
            continue  # the mean of the asks may be less than what the longest row asks
        assert budget.num_keep_R.tolist() == [targets for _, targets, _ in mine]


def test_uniform_gives_rows_with_room_more_of_their_own_targets():
    ranks = [[(10, 10, 20)], [(2, 10, 20)]]  # asks 15 and 7, mean 11; floors 13 and 5
    budgets = _budgets(ranks, 1, kind="uniform", ratio="0.5")
    assert [b.length_R.tolist() for b in budgets] == [[13], [13]]
    assert [b.num_keep_R.tolist() for b in budgets] == [[3], [10]]


def test_uniform_rounds_a_mean_that_is_not_whole_up():
    budgets = _budgets([[(2, 4, 20)], [(2, 5, 20)]], 1, kind="uniform", ratio="0.5")  # asks 4 and 5, floors 3 and 4
    assert [b.length_R.tolist() for b in budgets] == [[5], [5]]


def test_uniform_reduces_over_the_ranks_a_fixed_small_number_of_times():
    ranks = Ranks(2)

    def work(rank, all_reduce):
        one = torch.tensor([3, 4])
        plan_budget(
            one,
            one + rank,
            one * 5,
            kind="uniform",
            keep_ratio=0.5,
            multiple=1,
            extra_multiple=1,
            rows_per_microbatch=1,
            all_reduce=all_reduce,
        )

    ranks.run(work)
    assert ranks.calls[0] == ranks.calls[1] <= 2


@given(st.integers(0, 500), st.integers(1, 64))
def test_aligning_up_gives_the_next_multiple(length, multiple):
    got = align_up(length, multiple)
    assert got % multiple == 0 and length <= got < length + multiple


@pytest.mark.parametrize(
    ("length", "dense", "multiple", "extra", "expected"),
    [(5, 100, 4, 1, 8), (5, 100, 4, 6, 12), (8, 100, 8, 8, 8), (5, 7, 4, 1, 7), (0, 100, 1, 1, 1), (0, 100, 16, 1, 16)],
)
def test_alignment_meets_both_multiples_and_stops_at_the_dense_length(length, dense, multiple, extra, expected):
    assert align_length(length, dense, multiple=multiple, extra_multiple=extra) == expected


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(1 / 3, 4096), (2 / 3, 4096), (0.1 + 0.2, 4096), (0.12345678901234568, 1_000_000), (1e-20, 1)],
)
def test_a_ratio_of_many_digits_does_not_overflow(ratio, count):
    assert ceil_share(ratio, torch.tensor([count])).tolist() == [_share(repr(ratio), count)]
