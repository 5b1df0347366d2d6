"""Difficulty: the running average and the prior, against a plain dictionary of exact numbers; one planner."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.memory.difficulty import DifficultyStore, TokenPrior
from regate_megatron.ranks.topology import Topology

ALONE = Topology(0, 1, True, 0, 1, None, None, None)
NAN, INF = math.nan, math.inf
DECAY = 0.9


def _store(decay: float = DECAY) -> DifficultyStore:
    return DifficultyStore(decay, ALONE, 1e9)


def _update(store: DifficultyStore, *rows: tuple[tuple[int, int], list[float]], step: int = 0) -> None:
    keys, counts = torch.tensor([key for key, _ in rows]), torch.tensor([len(losses) for _, losses in rows])
    store.update(keys, counts, torch.tensor([loss for _, losses in rows for loss in losses]), step)


def _fetch(store: DifficultyStore, *rows: tuple[tuple[int, int], int], step: int = 0) -> list[list[float]]:
    counts = [count for _, count in rows]
    got = store.fetch(torch.tensor([key for key, _ in rows]), torch.tensor(counts), step)
    assert got.dtype == torch.float32
    return [record.tolist() for record in got.split(counts)]


def _about(values) -> object:
    return pytest.approx(values, rel=2**-11, nan_ok=True)  # float16 rounds to half of this at most


def _half(value: float) -> float:
    return float(np.float16(value))


def _mean(decay: float, before: float, loss: float) -> float:
    """The printed formula in float32, kept as float16."""
    return _half(np.float32(decay) * np.float32(before) + np.float32(1 - decay) * np.float32(loss))


def test_a_target_never_seen_is_nan():
    assert _fetch(_store(), ((1, 2), 3)) == [_about([NAN] * 3)]


def test_the_first_observation_sets_m_and_the_next_moves_it_by_a_tenth():
    store = _store()
    _update(store, ((1, 2), [4.0, 2.0]))
    assert _fetch(store, ((1, 2), 2)) == [[4.0, 2.0]]
    _update(store, ((1, 2), [2.0, 3.0]))
    assert _fetch(store, ((1, 2), 2)) == [_about([3.8, 2.1])]


def test_a_target_that_did_not_run_keeps_what_it_had():
    store = _store(0.5)
    _update(store, ((1, 2), [4.0, NAN, NAN]))
    assert _fetch(store, ((1, 2), 3)) == [_about([4.0, NAN, NAN])]
    _update(store, ((1, 2), [NAN, 6.0, NAN]))
    _update(store, ((1, 2), [2.0, 8.0, NAN]))
    assert _fetch(store, ((1, 2), 3)) == [_about([3.0, 7.0, NAN])]


@pytest.mark.parametrize("broken", [INF, -INF, NAN])
def test_a_loss_that_is_not_finite_teaches_nothing(broken):
    store = _store()
    _update(store, ((1, 2), [4.0, broken]))
    _update(store, ((1, 2), [broken, broken]))
    assert _fetch(store, ((1, 2), 2)) == [_about([4.0, NAN])]


def test_both_halves_of_the_key_tell_samples_apart():
    store = _store()
    _update(store, ((1, 2), [1.0]), ((2, 1), [2.0]), ((1, 3), [3.0]), ((-1, 2), [4.0]))
    assert _fetch(store, ((-1, 2), 1), ((1, 3), 1), ((2, 1), 1), ((1, 2), 1)) == [[4.0], [3.0], [2.0], [1.0]]
    assert len(store) == 4


def test_the_same_sample_twice_in_a_step_is_taken_in_row_after_row():
    store = _store(0.5)
    _update(store, ((1, 2), [8.0]), ((5, 5), [1.0]), ((1, 2), [4.0]), ((1, 2), [0.0]))
    assert _fetch(store, ((1, 2), 1), ((1, 2), 1)) == [[3.0], [3.0]]


def test_rows_of_no_targets_are_answered_in_place():
    store = _store()
    _update(store, ((1, 1), []), ((2, 2), [5.0]), ((3, 3), []))
    assert _fetch(store, ((1, 1), 0), ((2, 2), 1), ((3, 3), 0)) == [[], [5.0], []]


def test_a_zero_decay_remembers_the_last_loss_only():
    store = _store(0.0)
    _update(store, ((1, 2), [8.0]))
    _update(store, ((1, 2), [3.0]))
    assert _fetch(store, ((1, 2), 1)) == [[3.0]]


def test_fetching_teaches_nothing_and_returns_copies():
    store = _store()
    _update(store, ((1, 2), [8.0]))
    store.fetch(torch.tensor([[1, 2]]), torch.tensor([1]), 0).fill_(0)
    _fetch(store, ((9, 9), 4))
    assert _fetch(store, ((1, 2), 1)) == [[8.0]]
    assert len(store) == 1


LOSSES = st.one_of(st.just(NAN), st.floats(0, 20, width=32))
TARGETS = {(0, 0): 2, (0, 1): 1, (-(2**63), 5): 3, (2**63 - 1, -4): 0}


@given(
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    history=st.lists(
        st.lists(
            st.sampled_from(sorted(TARGETS)).flatmap(
                lambda key: st.tuples(st.just(key), st.lists(LOSSES, min_size=TARGETS[key], max_size=TARGETS[key]))
            ),
            min_size=1,
            max_size=4,
        ),
        max_size=6,
    ),
)
def test_m_is_what_a_dictionary_of_targets_says(decay, history):
    store, slow = _store(decay), {}
    for step in history:
        _update(store, *step)
        for key, losses in step:
            for target, loss in enumerate(losses):
                if not math.isnan(loss):
                    before = slow.get((key, target))
                    slow[key, target] = _half(loss) if before is None else _mean(decay, before, loss)
    got = _fetch(store, *TARGETS.items())
    for record, (key, count) in zip(got, TARGETS.items(), strict=True):
        expected = [slow.get((key, target), NAN) for target in range(count)]
        assert record == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_a_loss_beyond_the_range_of_float16_stays_finite():
    store = _store()
    _update(store, ((1, 2), [1e30, -1e30]))
    _update(store, ((1, 2), [3e38, 0.0]))
    assert _fetch(store, ((1, 2), 2)) == [[65504.0, _mean(DECAY, -65504.0, 0.0)]]


@pytest.mark.parametrize("loss", [0.01, 0.3, 3.0, 12.0, 20.0])
def test_rounding_stops_the_average_within_half_a_percent(loss):
    """The average stands still once it is within ulp / (2·(1-β)) of its goal."""
    for start in (0.0, 20.0):
        store = _store()
        _update(store, ((1, 2), [start]))
        for _ in range(150):
            _update(store, ((1, 2), [loss]))
        (m,), step = _fetch(store, ((1, 2), 1))[0], float(np.spacing(np.float16(loss)))
        assert abs(m - loss) <= 0.5 * step / (1 - DECAY) + step
        assert abs(m - loss) <= 0.0055 * loss


def test_a_sample_whose_number_of_targets_changed_is_another_sample():
    store = _store()
    _update(store, ((1, 2), [4.0, 2.0]))
    assert _fetch(store, ((1, 2), 3)) == [_about([NAN] * 3)]
    assert _fetch(store, ((1, 2), 2)) == [[4.0, 2.0]]


def test_the_route_of_a_fetch_serves_the_update_of_that_step_only():
    store = _store()
    _fetch(store, ((1, 1), 1), ((2, 2), 2), step=4)
    _update(store, ((1, 1), [1.0]), ((2, 2), [2.0, 3.0]), step=4)
    _fetch(store, ((1, 1), 1), step=5)
    _update(store, ((3, 3), [7.0]), step=6)  # step 5 was skipped
    assert _fetch(store, ((1, 1), 1), ((2, 2), 2), ((3, 3), 1)) == [[1.0], [2.0, 3.0], [7.0]]


def _teach(prior: TokenPrior, labels: list[int], losses: list[float]) -> None:
    prior.update(torch.tensor(labels, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64), ALONE)


def _ask(prior: TokenPrior, labels: list[int]) -> list[float]:
    got = prior.look_up(torch.tensor(labels, dtype=torch.int64))
    assert got.dtype == torch.float64
    return got.tolist()


def test_before_any_step_every_id_has_the_same_prior():
    assert _ask(TokenPrior(DECAY), [0, 7, 50_000]) == [0.0] * 3


def test_the_prior_takes_one_mean_per_id_and_step():
    prior = TokenPrior(DECAY)
    _teach(prior, [3, 3, 3, 5], [1.0, 2.0, 6.0, 7.0])
    assert _ask(prior, [3, 5]) == pytest.approx([3.0, 7.0])
    _teach(prior, [3, 3], [13.0, 13.0])  # two observations move it once, not twice
    assert _ask(prior, [3, 5]) == pytest.approx([0.9 * 3.0 + 0.1 * 13.0, 7.0])


def test_an_id_never_seen_has_the_overall_mean_over_targets():
    prior = TokenPrior(DECAY)
    _teach(prior, [3, 3, 3, 5], [1.0, 2.0, 6.0, 7.0])
    assert _ask(prior, [0, 4, 1000]) == pytest.approx([4.0] * 3)  # over targets, not over ids
    _teach(prior, [3], [14.0])
    assert _ask(prior, [0, 4, 1000]) == pytest.approx([0.9 * 4.0 + 0.1 * 14.0] * 3)


def test_a_step_without_targets_and_a_look_up_teach_nothing():
    prior = TokenPrior(DECAY)
    _teach(prior, [2], [8.0])
    _teach(prior, [], [])
    _ask(prior, [100])
    assert _ask(prior, []) == []
    assert _ask(prior, [2, 0, 100]) == [8.0] * 3


@given(
    decay=st.sampled_from([0.0, 0.5, 0.9]),
    history=st.lists(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 20)), max_size=8), max_size=6),
)
def test_the_prior_is_what_a_dictionary_of_ids_says(decay, history):
    prior, slow, overall = TokenPrior(decay), {}, None
    for step in history:
        _teach(prior, [label for label, _ in step], [loss for _, loss in step])
        for label in {label for label, _ in step}:
            losses = [loss for other, loss in step if other == label]
            mean = sum(losses) / len(losses)
            slow[label] = mean if label not in slow else decay * slow[label] + (1 - decay) * mean
        if step:
            mean = sum(loss for _, loss in step) / len(step)
            overall = mean if overall is None else decay * overall + (1 - decay) * mean
    expected = [slow.get(label, overall if overall is not None else 0.0) for label in range(9)]
    assert _ask(prior, list(range(9))) == pytest.approx(expected)


class _Among(Topology):
    """One of several planners, each a thread, that exchange through lists."""

    def all_reduce_planners(self, values, op):
        sent, barrier = self.planner_group
        sent[self.dp_rank] = values
        barrier.wait()
        reduced = getattr(torch.stack(sent), {"sum": "sum", "max": "amax"}[op])(dim=0)  # as gloo: of one size
        barrier.wait()
        return reduced

    def exchange_planners(self, values_Xx, send_D, receive_D=None):
        sent, barrier = self.planner_group
        sent[self.dp_rank] = values_Xx.split(send_D.tolist())
        barrier.wait()
        parts = [sent[rank][self.dp_rank] for rank in range(self.dp_size)]
        barrier.wait()
        found_D = torch.tensor([len(part) for part in parts])
        assert receive_D is None or torch.equal(receive_D, found_D)
        return torch.cat(parts), found_D


@pytest.mark.parametrize("size", [2, 3])
def test_several_planners_know_what_one_would_know(size):
    generator = torch.Generator().manual_seed(size)
    key_N2 = torch.randint(-(2**62), 2**62, (9, 2), generator=generator)
    count_N = torch.tensor([0, 1, 5, 3, 2, 7, 1, 4, 6])
    sample_SDN = torch.randint(0, 9, (6, size, 4), generator=generator)  # steps, planners, samples: some come twice
    loss_SDN = [
        [[torch.rand(int(count_N[sample]), generator=generator) for sample in row] for row in rows]
        for rows in sample_SDN.tolist()
    ]
    shared = ([None] * size, threading.Barrier(size, timeout=60))

    def plan(rank: int) -> list[torch.Tensor]:
        store = DifficultyStore(DECAY, _Among(rank, size, True, rank, 1, None, shared, None), 1e9)
        found = []
        for step, sample_DN in enumerate(sample_SDN):
            own_N = sample_DN[rank]
            found.append(store.fetch(key_N2[own_N], count_N[own_N], step))
            loss_X = torch.cat(loss_SDN[step][rank])
            store.update(key_N2[own_N], count_N[own_N], loss_X, step + (step == 2))  # once without its fetch
        return found

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(plan, range(size)))
    alone = _store()
    for step, sample_DN in enumerate(sample_SDN):
        every = sample_DN.reshape(-1)
        expected = alone.fetch(key_N2[every], count_N[every], step)
        theirs = torch.cat([of_rank[step] for of_rank in found])
        torch.testing.assert_close(theirs, expected, rtol=0, atol=0, equal_nan=True)
        loss_X = torch.cat([loss_T for of_rank in loss_SDN[step] for loss_T in of_rank])
        alone.update(key_N2[every], count_N[every], loss_X, step)


def test_planners_that_looked_up_different_ids_learn_one_prior():
    shared = ([None] * 2, threading.Barrier(2, timeout=60))

    def plan(rank: int) -> list[float]:
        prior = TokenPrior(DECAY)
        _ask(prior, [20 * rank])  # a sparse step: nobody else hears of it
        labels, losses = torch.tensor([3, 5 + rank]), torch.tensor([1.0 + rank, 7.0], dtype=torch.float64)
        prior.update(labels, losses, _Among(rank, 2, True, rank, 1, None, shared, None))
        return _ask(prior, [3, 5, 6, 0])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(plan, range(2))
    assert first == second == [1.5, 7.0, 7.0, 4.25]
