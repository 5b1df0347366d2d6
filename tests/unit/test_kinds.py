"""Losses by kind of target: what a dictionary of kinds says, shared by all planners, and saved."""

from __future__ import annotations

import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.memory.kinds import EDGES, KindMeans
from regate_megatron.memory.learned import Learned
from regate_megatron.memory.state import Progress, StateSave, read_state
from tests.unit.test_difficulty import ALONE, _Among

PROGRESS = Progress(step=7, dense_until=9, learns=True, settings={}, totals={}, teacher=None)
KEY_N2, COUNT_N = torch.tensor([[1, 2]]), torch.tensor([3])
LABEL_X, REFERENCE_X = torch.tensor([4, 4, 9]), torch.tensor([0.2, 5.0, 0.2], dtype=torch.float64)


def _double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _teach(means: KindMeans, step, topology=ALONE) -> None:
    label, reference, loss = zip(*step, strict=True) if step else ((), (), ())
    means.update(torch.tensor(label, dtype=torch.int64), _double(reference), _double(loss), topology)


REFERENCES = st.sampled_from([0.0, 0.05, *EDGES, 4.0, 100.0])


@given(
    decay=st.sampled_from([0.0, 0.5, 0.9]),
    history=st.lists(st.lists(st.tuples(st.integers(0, 4), REFERENCES, st.floats(0, 20)), max_size=8), max_size=5),
)
def test_a_kind_has_the_mean_of_its_last_dense_steps_and_of_one_more_target_of_its_bin(decay, history):
    means, sums = KindMeans(decay), {}
    for step in history:
        _teach(means, step)
        sums = {kind: (decay * total, decay * count) for kind, (total, count) in sums.items()}
        for label, reference, loss in step:
            kind = label, bisect_right(EDGES, reference)
            total, count = sums.get(kind, (0.0, 0.0))
            sums[kind] = total + loss, count + 1
    asked = [(label, reference) for label in range(6) for reference in (0.0, 0.1, 0.7, 2.0, 3.0, 50.0)]
    got_X, is_known_X = means.look_up(torch.tensor([a for a, _ in asked]), _double([b for _, b in asked]))

    def mean(of) -> float | None:
        total, count = (sum(values) for values in zip((0, 0), *of, strict=True))
        return total / count if count else None

    for (label, reference), got, is_known in zip(asked, got_X.tolist(), is_known_X.tolist(), strict=True):
        own_bin = bisect_right(EDGES, reference)
        of_bin = mean(values for (_, one), values in sums.items() if one == own_bin)
        of_all = mean(sums.values())
        beside = of_bin if of_bin is not None else of_all or 0.0
        total, count = sums.get((label, own_bin), (0.0, 0.0))
        assert got == pytest.approx((total + beside) / (count + 1))
        assert is_known == (count > 0)


def test_a_frequent_kind_follows_the_student_at_once():
    means = KindMeans(0.9)
    _teach(means, [(3, 1.0, 8.0)] * 50)
    for _ in range(16):
        _teach(means, [(3, 1.0, 1.0)] * 50)
    assert float(means.look_up(torch.tensor([3]), _double([1.0]))[0]) < 2.5  # a running average of its own: 8 or 7.3


def test_planners_that_saw_different_labels_know_the_same():
    shared = ([None] * 2, threading.Barrier(2, timeout=60))
    steps = [[(0, 0.2, 1.0), (3, 2.0, 5.0)], [(3, 2.0, 7.0), (8, 9.0, 2.0)]]

    def plan(rank: int) -> torch.Tensor:
        means = KindMeans(0.9)
        means.look_up(torch.tensor([20 * rank]), _double([1.0]))
        _teach(means, steps[rank], _Among(rank, 2, True, rank, 1, None, shared, None))
        return means.totals_2C

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(plan, range(2))
    alone = KindMeans(0.9)
    _teach(alone, steps[0] + steps[1])
    assert torch.equal(first, second)
    assert torch.equal(first[:, : alone.totals_2C.shape[1]], alone.totals_2C)


def _learned(by_kind: bool) -> Learned:
    return Learned(0.9, ALONE, 1e9, by_kind)


def _take_in(learned: Learned) -> None:
    losses = torch.tensor([1.0, 6.0, 0.5])
    learned.take_in(KEY_N2, COUNT_N, losses, LABEL_X, step=6, is_dense=True, reference_X=REFERENCE_X)


def _ask(learned: Learned) -> torch.Tensor:
    return learned.look_up(KEY_N2, COUNT_N, LABEL_X, 8, REFERENCE_X)[0]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_what_is_saved_comes_back_where_it_is_of_the_same_sort(tmp_path, before, now):
    learned = _learned(before)
    _take_in(learned)
    save = StateSave(learned, PROGRESS, ALONE, tmp_path / "aside")
    save.write()
    save.finish()
    found, resumed = read_state(tmp_path / "aside", ALONE, _learned(now)), _learned(now)
    resumed.adopt(found.records, found.prior)
    if before == now:
        assert torch.equal(_ask(resumed), _ask(learned))
        assert (len(resumed) == 0) == before  # by kind nothing of single samples is kept
    else:
        assert not resumed.prior.any_seen


def test_a_step_in_which_targets_were_left_out_teaches_kinds_nothing():
    learned = _learned(True)
    learned.take_in(KEY_N2, COUNT_N, torch.tensor([1.0, 6.0, 0.5]), LABEL_X, step=6, is_dense=False)
    assert not learned.prior.any_seen
