"""Selection: the best-scored targets of each row, told by an obvious sort; kept positions in order, fill at the end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.budget import Alignment
from regate_megatron.method.candidates import Candidates, Sort
from regate_megatron.method.selection import (
    keep_best,
    rank_candidates,
    rank_targets,
    select,
)

INF, NAN = math.inf, math.nan
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, NAN, INF, -INF]), st.floats(allow_nan=True))


@st.composite
def scored_rows(draw):
    """(score, is_target, num_keep) of 1 to 4 rows of 1 to 9 positions; nothing about the number asked is promised."""
    length = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 4))
    row = st.tuples(
        st.lists(VALUES, min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
        st.integers(0, length + 1),
    )
    scores, targets, counts = zip(*(draw(row) for _ in range(rows)), strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(targets), torch.tensor(counts)


def _keep(score_RS: torch.Tensor, is_target_RS: torch.Tensor, num_keep_R: torch.Tensor) -> torch.Tensor:
    """The targets that stay where each row is one group; bool [R, S]."""
    count_R, none_R = is_target_RS.sum(dim=1), torch.zeros_like(num_keep_R)
    sort = Sort(count_G=count_R, row_G=torch.arange(len(count_R)), keep_ratio=0.5, score_X=score_RS[is_target_RS])
    rows = Candidates(always_R=none_R, dense_M=none_R[:1], key_M=none_R[:1], sorts=(sort,))
    kept_RS = torch.zeros_like(is_target_RS)
    kept_RS[is_target_RS] = keep_best(rows, none_R, num_keep_R)
    return kept_RS


def _oracle(score_RS, is_target_RS, num_keep_R) -> list[list[bool]]:
    """Sort the targets of each row by (-score, position), NaN as -inf; keep the first ones."""
    kept = []
    for scores, targets, count in zip(score_RS.tolist(), is_target_RS.tolist(), num_keep_R.tolist(), strict=True):
        worth = [-INF if math.isnan(score) else score for score in scores]
        ranking = sorted((-worth[place], place) for place in range(len(worth)) if targets[place])
        best = {place for _, place in ranking[:count]}
        kept.append([place in best for place in range(len(worth))])
    return kept


@given(scored_rows())
def test_the_kept_targets_are_those_of_a_plain_sort_by_score_then_position(rows):
    assert _keep(*rows).tolist() == _oracle(*rows)


@given(scored_rows(), st.randoms(use_true_random=False))
def test_a_row_is_selected_alike_wherever_it_stands_in_the_batch(rows, order):
    shuffled = list(range(len(rows[0])))
    order.shuffle(shuffled)
    assert torch.equal(_keep(*(part[shuffled] for part in rows)), _keep(*rows)[shuffled])


@given(scored_rows())
def test_scores_of_other_positions_do_not_matter(rows):
    score_RS, is_target_RS, num_keep_R = rows
    for other in (INF, -INF, NAN):
        changed_RS = torch.where(is_target_RS, score_RS, other)
        assert torch.equal(_keep(changed_RS, is_target_RS, num_keep_R), _keep(*rows))


def _kept(scores, targets, count) -> list[int]:
    mask = _keep(torch.tensor([scores]), torch.tensor([targets]), torch.tensor([count]))
    return torch.where(mask[0])[0].tolist()


@pytest.mark.parametrize(
    ("scores", "targets", "count", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 1, 1], 2, [1, 2]),
        ([0.0, -0.0, 0.0], [1, 1, 1], 1, [0]),
        ([9.0, 1.0, 2.0], [0, 0, 0], 2, []),
        ([9.0, 1.0, 2.0], [1, 1, 1], 3, [0, 1, 2]),
        ([9.0, 1.0, 2.0], [1, 1, 1], 0, []),
        ([5.0], [1], 1, [0]),
        ([NAN, 1.0, 2.0], [1, 1, 1], 2, [1, 2]),
        ([NAN, NAN], [1, 1], 1, [0]),
        ([-INF, 1.0, -INF], [1, 1, 1], 2, [0, 1]),
        ([-INF, -INF, 0.0], [0, 1, 0], 1, [1]),
        ([INF, 1.0, INF], [1, 1, 1], 2, [0, 2]),
    ],
    ids=[
        "ties go to the lower position",
        "minus zero ties with zero",
        "no targets",
        "all targets",
        "none asked",
        "one token",
        "NaN ranks last",
        "only NaN",
        "-inf ranks last, ties to the lower position",
        "a target at -inf is kept before a context position",
        "+inf ranks first",
    ],
)
def test_selection_at_the_edges(scores, targets, count, kept):
    assert _kept(scores, [bool(target) for target in targets], count) == kept


def test_a_long_row_of_ties_keeps_its_first_targets():
    length = 5000  # long enough for an unstable sort to show
    assert _kept([0.25] * length, [place % 2 == 1 for place in range(length)], 700) == list(range(1, 1400, 2))


# ------------------------------------------------------------------------------------------------------- packed rows


@st.composite
def packed_rows(draw):
    """Per row its samples, per sample (scores of its targets, floor); at most 7 targets in a row."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        samples, left = [], 7
        for _ in range(draw(st.integers(1, 3))):
            count = draw(st.integers(0, left))
            left -= count
            scores = draw(st.lists(VALUES, min_size=count, max_size=count))
            samples.append((scores, draw(st.integers(0, count))))
        rows.append(samples)
    return rows


def _flat(rows):
    samples = [(row, scores, floor) for row, own in enumerate(rows) for scores, floor in own]
    score_X = torch.tensor([score for _, scores, _ in samples for score in scores], dtype=torch.float64)
    row_X = torch.tensor([row for row, scores, _ in samples for _ in scores], dtype=torch.int64)
    group_X = torch.tensor([g for g, (_, scores, _) in enumerate(samples) for _ in scores], dtype=torch.int64)
    return score_X, row_X, group_X, torch.tensor([floor for _, _, floor in samples], dtype=torch.int64)


def _best_set(samples, num_keep):
    """The best set of ``num_keep`` targets that holds every floor, by trying all: higher scores first, ties lower."""
    targets = [(sample, score) for sample, (scores, _) in enumerate(samples) for score in scores]
    worth = [-INF if math.isnan(score) else score for _, score in targets]
    allowed = [
        chosen
        for chosen in itertools.combinations(range(len(targets)), num_keep)
        if all(
            sum(targets[place][0] == sample for place in chosen) >= floor for sample, (_, floor) in enumerate(samples)
        )
    ]
    # Sorted from the best: a set is better if its scores are, one by one; in a matroid one set is best in all places.
    return min(allowed, key=lambda chosen: sorted((-worth[place], place) for place in chosen))


@given(packed_rows())
def test_packed_rows_keep_the_best_set_that_holds_the_floor_of_every_sample(rows):
    score_X, row_X, group_X, floor_G = _flat(rows)
    rank_X = rank_targets(score_X, row_X, group_X, floor_G)
    for row, samples in enumerate(rows):
        places = rank_X[row_X == row].tolist()
        assert sorted(places) == list(range(len(places)))
        for num_keep in range(sum(floor for _, floor in samples), len(places) + 1):
            assert [at for at, place in enumerate(places) if place < num_keep] == sorted(_best_set(samples, num_keep))


def _select_packed(rows, contexts, *, kind, ratio, of_rows=False):
    groups = [[sum(len(scores) for scores, _ in own)] if of_rows else [len(s) for s, _ in own] for own in rows]
    chosen = select(
        Candidates(
            always_R=torch.tensor(contexts),
            dense_M=torch.tensor([16] * len(rows)),
            key_M=torch.arange(len(rows)),
            sorts=(
                Sort(
                    count_G=torch.tensor([count for own in groups for count in own]),
                    row_G=torch.tensor([row for row, own in enumerate(groups) for _ in own]),
                    keep_ratio=ratio,
                    score_X=_flat(rows)[0],
                ),
            ),
        ),
        kind=kind,
        alignment=Alignment(1, 1),
        all_gather=lambda values: values[None],
    )
    kept, counts = iter(chosen.is_kept_X.tolist()), []
    for own in rows:
        counts.append([sum(next(kept) for _ in scores) for scores, _ in own])
    return chosen.length_M.tolist(), counts


@given(packed_rows(), st.sampled_from([0.1, 0.5, 0.75, 1.0]))
def test_per_sample_keeps_of_every_sample_exactly_its_share(rows, ratio):
    _, counts = _select_packed(rows, [2] * len(rows), kind="per-sample", ratio=ratio)
    assert counts == [[math.ceil(ratio * len(scores)) for scores, _ in own] for own in rows]


@given(packed_rows(), st.sampled_from(["uniform", "balanced"]), st.sampled_from([0.1, 0.5, 0.75]))
def test_no_sample_of_a_packed_row_falls_below_its_floor(rows, kind, ratio):
    _, counts = _select_packed(rows, [2] * len(rows), kind=kind, ratio=ratio)
    for own, held in zip(rows, counts, strict=True):
        assert all(have >= math.ceil(ratio * len(scores) / 2) for (scores, _), have in zip(own, held, strict=True))


def test_a_packed_row_can_count_as_one():
    rows = [[([9.0, 8.0, 7.0, 6.0], 0), ([1.0, 2.0, 3.0, 4.0], 0)]]
    assert _select_packed(rows, [2], kind="per-sample", ratio=0.5) == ([6], [[2, 2]])
    assert _select_packed(rows, [2], kind="per-sample", ratio=0.5, of_rows=True) == ([6], [[4, 0]])
    assert _select_packed(rows, [2], kind="uniform", ratio=0.5) == ([6], [[3, 1]])


@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_what_is_kept_without_an_order_is_what_comes_first_in_the_whole_order(seed, num_sorts, several_groups):
    generator = np.random.default_rng(seed)
    sorts = []
    for _ in range(num_sorts):
        row_G = np.repeat(np.arange(3), generator.integers(0, 3, 3) if several_groups else 1)
        count_G = generator.integers(0, 30, len(row_G))
        score_X = generator.choice([0.0, 1.0, 2.0, 3.0, np.nan], count_G.sum())
        sorts.append(
            Sort(
                count_G=torch.from_numpy(count_G),
                row_G=torch.from_numpy(row_G),
                keep_ratio=float(generator.choice([0.1, 0.3, 0.5, 1.0])),
                score_X=torch.from_numpy(score_X),
                least_G=torch.from_numpy(generator.integers(0, 5, len(row_G))),
            )
        )
    rows = {"always_R": torch.zeros(3, dtype=torch.int64), "dense_M": torch.full((3,), 200), "key_M": torch.arange(3)}
    candidates = Candidates(**rows, sorts=tuple(sorts))
    for first_G, least_R in ((candidates.floor_G, candidates.floor_R), (candidates.ask_G, candidates.ask_R)):
        num_keep_R = torch.from_numpy(generator.integers(least_R.numpy(), candidates.full_R.numpy() + 1))
        expected_X = rank_candidates(candidates, first_G).rank_X < num_keep_R[candidates.row_X]
        assert torch.equal(keep_best(candidates, first_G, num_keep_R), expected_X)
