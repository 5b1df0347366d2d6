"""The balanced budget against exhaustive search: the common total, and how a rank spreads it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.balance import common_total
from regate_megatron.method.budget import Alignment
from regate_megatron.method.candidates import Candidates, Sort
from regate_megatron.method.selection import select
from tests.unit.ranks import over_ranks

RATIOS = st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.9, 1e-5])
SCORES = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 7.0])
WITHIN = Fraction(102, 100)


def _imbalance(total, spans) -> Fraction:
    run = [min(max(total, low), high) for low, high in spans]
    return Fraction(max(run) * len(run), sum(run))


# ------------------------------------------------------------------------------------------------- the common total


@st.composite
def spans_of_ranks(draw):
    """(step, mean ask, (low, high) per rank): multiples of the step."""
    step = draw(st.sampled_from([1, 4]))
    lows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    spans = [(low * step, (low + draw(st.integers(0, 60))) * step) for low in lows]
    ask = draw(st.integers(min(low for low, _ in spans), max(high for _, high in spans)))
    return step, ask, spans


@given(spans_of_ranks())
def test_the_total_is_the_one_nearest_to_the_ask_that_balances(case):
    step, ask, spans = case
    low_D, high_D = torch.tensor(spans).unbind(dim=1)
    total, achievable = common_total(ask, low_D, high_D, step)
    wanted = math.ceil(ask / step) * step
    largest_low = max(low for low, _ in spans)
    every = range(step, max(wanted, largest_low) + 10 * step, step)
    assert achievable == pytest.approx(float(min(_imbalance(one, spans) for one in every)))
    balancing = [one for one in every if _imbalance(one, spans) <= WITHIN]
    if balancing:
        assert abs(total - wanted) == min(abs(one - wanted) for one in balancing)
    else:
        assert total == max(wanted, largest_low)


@pytest.mark.parametrize(
    ("ask", "spans", "total"),
    [
        (50, [(40, 80), (30, 90)], 50),
        (50, [(40, 80), (70, 90)], 68),  # a rank of much context: the others may run nearly as long
        (50, [(10, 20), (15, 90)], 20),  # a rank of short rows
        (50, [(10, 20), (45, 90), (30, 90)], 50),  # out of reach: nobody is starved for it
        (50, [(10, 20), (70, 90), (30, 90)], 70),
        (50, [(40, 40)], 50),
    ],
)
def test_the_total_in_cases(ask, spans, total):
    low_D, high_D = torch.tensor(spans).unbind(dim=1)
    assert common_total(ask, low_D, high_D, 1)[0] == total


# -------------------------------------------------------------------------------------------------------- whole steps


@st.composite
def ranks_of_rows(draw, max_ranks=4, max_micro=3, max_dense=24, odd=True):
    """(rows per microbatch, dense length, per rank the rows as (context, scores of each sample))."""
    rows, micro = draw(st.integers(1, 2)), draw(st.integers(1, max_micro))
    dense = draw(st.integers(1, max_dense)) if odd else draw(st.integers(1, max_dense // 4)) * 4
    ranks = []
    for _ in range(draw(st.integers(1, max_ranks))):
        mine = []
        for _ in range(micro * rows):
            targets = draw(st.integers(0, dense))
            scores = draw(st.lists(SCORES, min_size=targets, max_size=targets))
            cut = draw(st.integers(0, targets))
            mine.append((draw(st.integers(0, dense - targets)), [scores[:cut], scores[cut:]]))
        ranks.append(mine)
    return rows, dense, ranks


def _rows(mine, rows, dense, ratio, keys=None) -> Candidates:
    groups = [(row, scores) for row, (_, samples) in enumerate(mine) for scores in samples]
    targets = Sort(
        count_G=torch.tensor([len(scores) for _, scores in groups]),
        row_G=torch.tensor([row for row, _ in groups]),
        keep_ratio=ratio,
        score_X=torch.tensor([score for _, scores in groups for score in scores], dtype=torch.float64),
    )
    return Candidates(
        always_R=torch.tensor([context for context, _ in mine]),
        dense_M=torch.full((len(mine) // rows,), dense),
        key_M=torch.tensor(keys or range(len(mine) // rows)),
        sorts=(targets,),
    )


def _select(case, ratio, step):
    rows, dense, ranks = case
    return over_ranks(
        len(ranks),
        lambda rank, all_gather: select(
            _rows(ranks[rank], rows, dense, ratio),
            kind="balanced",
            alignment=Alignment(step, 1),
            all_gather=all_gather,
        ),
    )


def _share(ratio, count, divisor=1):
    return math.ceil(Fraction(str(ratio)) * count / divisor)


def _best_of_row(samples, floors, num_keep):
    """Largest sum of scores of ``num_keep`` targets that holds every floor; by trying all sets."""
    targets = [(sample, score) for sample, scores in enumerate(samples) for score in scores]
    best = None
    for chosen in itertools.combinations(targets, min(num_keep, len(targets))):
        held = [sum(sample == one for sample, _ in chosen) for one in range(len(samples))]
        if all(have >= floor for have, floor in zip(held, floors, strict=True)):
            worth = sum(score for _, score in chosen)
            best = worth if best is None else max(best, worth)
    return best


def _low_and_high(mine, rows, dense, ratio, step):
    def length(need):
        return min(max(1, math.ceil(need / step)) * step, dense)

    floors = [context + sum(_share(ratio, len(s), 2) for s in samples) for context, samples in mine]
    most = [context + sum(map(len, samples)) for context, samples in mine]
    starts = range(0, len(mine), rows)
    low = [length(max(floors[start : start + rows])) for start in starts]
    return low, [length(max(most[start : start + rows])) for start in starts]


@given(ranks_of_rows(max_ranks=1, max_micro=3, max_dense=8, odd=False), RATIOS, st.sampled_from([1, 2, 4]))
def test_a_rank_keeps_the_most_targets_and_then_the_best_that_its_total_allows(case, ratio, step):
    """Every way to give its microbatches lengths is tried, and within each every set of targets."""
    rows, dense, (mine,) = case
    (chosen,) = _select(case, ratio, step)
    low, high = _low_and_high(mine, rows, dense, ratio, step)
    total = sum(chosen.length_M.tolist())

    def worth(lengths):
        kept, score = 0, 0.0
        for row, (context, samples) in enumerate(mine):
            num_keep = min(sum(map(len, samples)), lengths[row // rows] - context)
            kept += num_keep
            score += _best_of_row(samples, [_share(ratio, len(s), 2) for s in samples], num_keep)
        return kept, score

    every = itertools.product(*(range(start, stop + step, step) for start, stop in zip(low, high, strict=True)))
    best = max(worth(lengths) for lengths in every if sum(lengths) == total)
    kept_score = float(_rows(mine, rows, dense, ratio).score_X[chosen.is_kept_X].sum())
    assert (int(chosen.is_kept_X.sum()), kept_score) == pytest.approx(best)
    ask = sum(context + sum(_share(ratio, len(s)) for s in samples) for context, samples in mine)
    assert rows * total == min(max(math.ceil(ask / (rows * step)) * rows * step, rows * sum(low)), rows * sum(high))


@given(ranks_of_rows(), RATIOS, st.sampled_from([1, 2, 4, 6]))
def test_lengths_are_aligned_or_dense_and_every_sample_has_its_floor(case, ratio, step):
    rows, dense, ranks = case
    for mine, chosen in zip(ranks, _select(case, ratio, step), strict=True):
        kept = iter(chosen.is_kept_X.tolist())
        low, high = _low_and_high(mine, rows, dense, ratio, step)
        for length, least, most in zip(chosen.length_M.tolist(), low, high, strict=True):
            assert (length % step == 0 or length == dense) and least <= length <= most
        for row, (context, samples) in enumerate(mine):
            held = [sum(next(kept) for _ in scores) for scores in samples]
            length = int(chosen.length_M[row // rows])
            assert sum(held) == min(sum(map(len, samples)), length - context)  # no fill while targets are left
            assert all(_share(ratio, len(s), 2) <= have for s, have in zip(samples, held, strict=True))


@given(ranks_of_rows(max_dense=24, odd=False), RATIOS, st.sampled_from([1, 2, 4]))
def test_ranks_run_the_same_total_wherever_floors_and_row_lengths_allow(case, ratio, step):
    rows, dense, ranks = case
    chosen = _select(case, ratio, step)
    run = [rows * sum(one.length_M.tolist()) for one in chosen]
    spans = [tuple(rows * sum(part) for part in _low_and_high(mine, rows, dense, ratio, step)) for mine in ranks]
    assert len({one.achievable for one in chosen}) == 1
    achieved = Fraction(max(run) * len(run), sum(run))
    if max(low for low, _ in spans) <= min(high for _, high in spans):
        assert chosen[0].achievable == 1
        assert achieved <= WITHIN
    assert float(achieved) >= chosen[0].achievable - 1e-12


@given(ranks_of_rows(), RATIOS, st.randoms(use_true_random=False))
def test_a_rank_plans_alike_whatever_its_number(case, ratio, order):
    rows, dense, ranks = case
    shuffled = list(range(len(ranks)))
    order.shuffle(shuffled)
    before, after = _select(case, ratio, 2), _select((rows, dense, [ranks[rank] for rank in shuffled]), ratio, 2)
    for place, rank in enumerate(shuffled):
        assert torch.equal(after[place].length_M, before[rank].length_M)
        assert torch.equal(after[place].is_kept_X, before[rank].is_kept_X)


@given(ranks_of_rows(max_ranks=1), RATIOS, st.sampled_from([1, 2]), st.randoms(use_true_random=False))
def test_a_microbatch_is_planned_alike_wherever_it_stands(case, ratio, step, order):
    rows, dense, (mine,) = case
    keys = list(range(len(mine) // rows))
    shuffled = keys[:]
    order.shuffle(shuffled)

    def plan(micros):
        moved = [mine[micro * rows + row] for micro in micros for row in range(rows)]
        (chosen,) = over_ranks(
            1,
            lambda _, all_gather: select(
                _rows(moved, rows, dense, ratio, micros),
                kind="balanced",
                alignment=Alignment(step, 1),
                all_gather=all_gather,
            ),
        )
        return dict(zip(micros, chosen.length_M.tolist(), strict=True))

    assert plan(keys) == plan(shuffled)


def _one_rank(rows, *, ratio=0.5, step=1, dense=100, keys=None):
    (chosen,) = over_ranks(
        1,
        lambda _, all_gather: select(
            _rows([(context, [scores]) for context, scores in rows], 1, dense, ratio, keys),
            kind="balanced",
            alignment=Alignment(step, 1),
            all_gather=all_gather,
        ),
    )
    return chosen.length_M.tolist(), chosen.is_kept_X.int().tolist()


def test_the_best_targets_of_the_rank_get_the_positions():
    lengths, kept = _one_rank([(10, [9.0, 8.0, 7.0, 6.0]), (10, [1.0, 2.0, 3.0, 4.0])])
    assert lengths == [13, 11]  # four of eight; one each is the floor
    assert kept == [1, 1, 1, 0, 0, 0, 0, 1]


def test_equal_scores_are_shared_out_evenly_and_go_to_the_lower_position_and_key():
    lengths, kept = _one_rank([(1, [1.0] * 6), (1, [1.0] * 6), (1, [1.0] * 6)], ratio=0.5)
    assert lengths == [4, 4, 4] and kept == [1, 1, 1, 0, 0, 0] * 3
    one_more = [(1, [1.0] * 6), (1, [1.0] * 7)]  # asks 3 and 4
    assert _one_rank(one_more, keys=[5, 9])[0] == [5, 4]
    assert _one_rank(one_more, keys=[9, 5])[0] == [4, 5]


def test_a_step_goes_where_no_fill_is_needed():
    """With a step of 4, the second row's other target would drag three fill slots along: four targets are better."""
    lengths, kept = _one_rank([(3, [1.0] * 9), (3, [98.0, 99.0])], ratio=0.6, step=4, dense=12)
    assert lengths == [12, 4] and kept == [1] * 9 + [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_scores_that_are_no_numbers_do_no_harm(bad):
    lengths, kept = _one_rank([(2, [bad, 1.0, bad, 2.0]), (2, [bad] * 4)])
    assert sum(lengths) == 8 and sum(kept) == 4


def test_steps_without_targets():
    assert _one_rank([(5, []), (7, [])]) == ([5, 7], [])
    assert _one_rank([(0, []), (0, [])]) == ([1, 1], [])
    assert _one_rank([(0, [1.0]), (0, [2.0])]) == ([1, 1], [1, 1])


def test_a_rank_with_an_odd_dense_length_uses_what_is_left_of_its_total():
    """Steps of 8 under a dense length of 20: 8, 16, 20. Asks of 13, 18 and 13 make a total of 48, floors take 32.

    The first row's steps are worth most and take 12; the third row's step of 8 is next and does not fit into the rest
    of 4, the second row's last one does.
    """
    rows = [(0, [5.0] * 20), (12, [0.5] * 8), (0, [1.0] * 20)]
    assert _one_rank(rows, ratio=0.65, step=8, dense=20)[0] == [20, 20, 8]
