"""Scores: the fused formulas by hand, and a random score that depends on content, step, seed and position alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.chance import uniform_in_0_1
from regate_megatron.method.scores import SCORES, Signals

DIFFICULTY = torch.tensor([[0.5, 2.0, 8.0], [0.0, 1.0, 3.25]])
REFERENCE = torch.tensor([[4.0, 1.0, 0.25], [2.0, 0.0, 1.5]])
KEYS = torch.tensor([[1, 2], [-(2**63), 2**63 - 1], [0, 0], [2, 1]])

FORMULAS = {
    ("regate", "sum", 0.5): [[2.5, 2.5, 8.125], [1.0, 1.0, 4.0]],
    ("regate", "convex", 0.5): [[2.25, 1.5, 4.125], [1.0, 0.5, 2.375]],
    ("regate", "convex", 0.25): [[1.375, 1.75, 6.0625], [0.5, 0.75, 2.8125]],
    ("regate", "sum", 0.0): DIFFICULTY.tolist(),
    ("regate", "sum", 2.0): [[8.5, 4.0, 8.5], [4.0, 1.0, 6.25]],
    ("regate", "convex", 0.0): DIFFICULTY.tolist(),
    ("regate", "convex", 1.0): REFERENCE.tolist(),
    ("student", "sum", 0.5): DIFFICULTY.tolist(),
    ("student", "convex", 0.5): DIFFICULTY.tolist(),
    ("reference", "sum", 0.5): REFERENCE.tolist(),
    ("reference", "convex", 0.25): REFERENCE.tolist(),
    ("excess", "sum", 0.5): [[-3.5, 1.0, 7.75], [-2.0, 1.0, 1.75]],
    ("excess", "convex", 0.5): [[-3.5, 1.0, 7.75], [-2.0, 1.0, 1.75]],
    ("product", "sum", 0.5): [[2.0, 2.0, 2.0], [0.0, 0.0, 4.875]],
    ("minimum", "sum", 0.5): [[0.5, 1.0, 0.25], [0.0, 0.0, 1.5]],
    ("gain", "sum", 0.5): [[3.5, -1.0, -7.75], [2.0, -1.0, -1.75]],
    ("gain", "convex", 0.5): [[3.5, -1.0, -7.75], [2.0, -1.0, -1.75]],
}


def fuse(difficulty, reference, *, score, fusion="sum", reference_weight=0.5) -> torch.Tensor:
    """One row of the table, from losses as the planner gives them: in double precision, None where not needed."""
    row = SCORES[score]
    signals = Signals(
        difficulty_X=difficulty.double() if row.needs_difficulty else None,
        reference_X=reference.double() if row.needs_reference else None,
        reference_weight=reference_weight,
        fusion=fusion,
        keys=lambda: (KEYS, torch.arange(len(KEYS))),
        seed=1,
        step=5,
    )
    return row.of(signals)


def random_score(key_R2: torch.Tensor, num_places: int, *, seed: int, step: int) -> torch.Tensor:
    """The score at every place of every row; [R, S]."""
    return uniform_in_0_1(key_R2[:, None, :], torch.arange(num_places), seed=seed, step=step)


@pytest.mark.parametrize(("names", "expected"), FORMULAS.items(), ids=str)
def test_each_score_is_its_formula(names, expected):
    score, fusion, weight = names
    got = fuse(DIFFICULTY, REFERENCE, score=score, fusion=fusion, reference_weight=weight)
    assert got.dtype == torch.float64
    assert got.tolist() == expected


def test_every_score_has_a_formula_here_and_uses_what_it_says():
    assert set(SCORES) == {score for score, _, _ in FORMULAS} | {"random"}
    assert (
        fuse(DIFFICULTY, REFERENCE, score="random").tolist()
        == random_score(KEYS, 4, seed=1, step=5).diagonal().tolist()
    )


@pytest.mark.parametrize("score", [name for name, row in SCORES.items() if row.needs_difficulty])
def test_a_score_is_blind_where_nothing_learned_leaves_all_targets_alike(score):
    got = fuse(torch.zeros(2, 3), REFERENCE, score=score)
    assert SCORES[score].is_blind == (got.unique().numel() == 1)


def test_scores_are_fused_in_double_precision():
    got = fuse(torch.tensor([[1.0]]), torch.tensor([[2.0**-29]]), score="regate")
    assert float(got) == 1.0 + 2.0**-30  # float32 would lose the reference loss


def test_fusing_changes_no_input():
    before = DIFFICULTY.clone(), REFERENCE.clone()
    for score in SCORES:
        fuse(DIFFICULTY, REFERENCE, score=score, fusion="convex")
    assert torch.equal(DIFFICULTY, before[0]) and torch.equal(REFERENCE, before[1])


@given(
    keys=st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_random_score_does_not_depend_on_the_batch_around_it(keys, order, step, seed):
    whole = random_score(torch.tensor(keys), 7, seed=seed, step=step)
    shuffled = list(range(len(keys)))
    order.shuffle(shuffled)
    assert torch.equal(random_score(torch.tensor(keys)[shuffled], 7, seed=seed, step=step), whole[shuffled])
    for row, key in enumerate(keys):  # alone, and in a longer row
        alone = random_score(torch.tensor([key]), 12, seed=seed, step=step)
        assert torch.equal(alone[0, :7], whole[row])
    assert 0 <= float(whole.min()) and float(whole.max()) < 1


@pytest.mark.parametrize("what", ["step", "seed", "first half of the key", "second half of the key", "position"])
def test_a_random_score_depends_on_its(what):
    base = random_score(KEYS, 64, seed=1, step=5)
    if what == "position":
        assert all(row.unique().numel() == 64 for row in base)
        return
    keys = KEYS.clone()
    if "key" in what:
        keys[:, 0 if what.startswith("first") else 1] ^= 1
    other = random_score(keys, 64, seed=2 if what == "seed" else 1, step=6 if what == "step" else 5)
    assert not (base == other).any()
    assert abs(float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])) < 0.25


def test_a_key_and_its_swap_score_differently():
    assert not (random_score(KEYS, 64, seed=1, step=5)[0] == random_score(KEYS, 64, seed=1, step=5)[3]).any()


def test_random_scores_are_uniform_and_independent_of_the_neighbour():
    keys = torch.arange(400).view(200, 2)
    scores = random_score(keys, 100, seed=3, step=17)
    share = torch.histc(scores.flatten().float(), bins=10, min=0, max=1) / scores.numel()
    assert (share - 0.1).abs().max() < 0.01  # 4.7 standard deviations
    assert abs(float(scores.mean()) - 0.5) < 0.01
    pairs = torch.stack([scores[:, :-1].flatten(), scores[:, 1:].flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.03
    rows = torch.stack([scores[:-1].flatten(), scores[1:].flatten()])
    assert abs(float(torch.corrcoef(rows)[0, 1])) < 0.03


def test_each_target_is_kept_about_equally_often_over_the_steps():
    wins = torch.zeros(10)
    for step in range(300):
        wins[random_score(torch.tensor([[5, 6]]), 10, seed=0, step=step)[0].topk(5).indices] += 1
    assert (wins / 300 - 0.5).abs().max() < 0.13  # 4.5 standard deviations


def test_the_random_score_is_frozen():
    """A resumed run must draw what the first run would have drawn, whatever version of the package it runs."""
    state = (1 ^ _mix_by_hand(1234 + _GOLDEN)) % _WORD
    state = _mix_by_hand(_mix_by_hand(state) ^ 2)
    state = _mix_by_hand(state + _GOLDEN * (9 + 1))
    expected = [(_mix_by_hand(state + _GOLDEN * (position + 1)) >> 11) / 2.0**53 for position in range(5)]
    assert random_score(torch.tensor([[1, 2]]), 5, seed=1234, step=9)[0].tolist() == expected


_WORD, _GOLDEN = 1 << 64, 0x9E3779B97F4A7C15


def _mix_by_hand(x: int) -> int:
    """The finaliser of splitmix64 on unsigned Python integers."""
    x %= _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _WORD
    return x ^ (x >> 31)
