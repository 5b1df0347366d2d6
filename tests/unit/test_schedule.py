"""The schedule: warm-up, then cycles that begin dense and go on sparse."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron import ReGateConfig
from regate_megatron.method.schedule import Schedule, drawn_ratio
from regate_megatron.method.schedule import keep_ratio_of as ratio_of
from regate_megatron.method.schedule import phase_of as phase_in

PAPER = {"warmup_steps": 100, "cycle_steps": 128, "dense_steps": 16}


def phase_of(step: int, **numbers) -> str:
    return phase_in(step, Schedule(**numbers))


def keep_ratio_of(step: int, config: ReGateConfig) -> float:
    return ratio_of(step, config.keep_ratio, config.keep_ratio_end, config.schedule)


def test_the_papers_schedule_step_by_step():
    phases = [phase_of(step, **PAPER) for step in range(100 + 2 * 128)]
    cycle = ["dense"] * 16 + ["sparse"] * 112
    assert phases == ["warmup"] * 100 + cycle + cycle


def test_the_papers_mean_share_is_0_5625():
    share = {"dense": 1.0, "sparse": 0.5}
    assert sum(share[phase_of(step, **PAPER)] for step in range(100, 228)) / 128 == 0.5625


def test_without_warm_up_the_first_cycle_begins_at_step_0():
    phases = [phase_of(step, warmup_steps=0, cycle_steps=2, dense_steps=1) for step in range(4)]
    assert phases == ["dense", "sparse"] * 2


def test_no_dense_steps_means_all_sparse_and_a_full_cycle_of_them_means_all_dense():
    assert {phase_of(step, warmup_steps=0, cycle_steps=5, dense_steps=0) for step in range(12)} == {"sparse"}
    assert {phase_of(step, warmup_steps=0, cycle_steps=5, dense_steps=5) for step in range(12)} == {"dense"}


def test_a_cool_down_is_dense_to_the_end_and_changes_nothing_before():
    """1000 iterations with a cool-down of 90: the last 90 are dense."""
    before = [phase_of(step, **PAPER) for step in range(1000)]
    cooled = [phase_of(step, **PAPER, dense_from=1000 - 90) for step in range(1000)]
    assert cooled == before[:910] + ["dense"] * 90
    assert "sparse" in before[910:]


def _moving(start: float, end: float, steps: int, warmup: int = 100, cycle: int = 128) -> ReGateConfig:
    schedule = {"warmup_steps": warmup, "cycle_steps": cycle, "dense_steps": 0}
    return ReGateConfig(keep_ratio=start, keep_ratio_end=end, keep_ratio_steps=steps, **schedule)


def test_the_ratio_is_constant_unless_told_otherwise():
    assert {keep_ratio_of(step, ReGateConfig(keep_ratio=0.3)) for step in range(0, 10_000, 17)} == {0.3}


@pytest.mark.parametrize(("start", "end"), [(0.3, 0.7), (0.7, 0.3)])
def test_the_ratio_goes_to_its_end_in_equal_steps_cycle_by_cycle(start, end):
    config = _moving(start, end, steps=4 * 128)
    ratios = [keep_ratio_of(step, config) for step in range(100 + 6 * 128)]
    levels = [start, (3 * start + end) / 4, (start + end) / 2, (start + 3 * end) / 4, end, end]
    assert ratios == [start] * 100 + [round(level, 4) for level in levels for _ in range(128)]


def test_a_ratio_that_takes_no_whole_cycles_ends_with_the_first_cycle_after_it():
    config = _moving(0.5, 1.0, steps=5, warmup=0, cycle=2)
    assert [keep_ratio_of(step, config) for step in range(0, 10, 2)] == [0.5, 0.7, 0.9, 1.0, 1.0]


@given(
    ends=st.tuples(*[st.floats(1e-7, 1.0)] * 2),
    steps=st.integers(1, 300),
    cycle=st.integers(1, 40),
    step=st.integers(0, 600),
)
def test_a_moving_ratio_stays_between_its_ends_and_has_four_decimals_on_the_way(ends, steps, cycle, step):
    config = _moving(*ends, steps=steps, warmup=10, cycle=cycle)
    ratio = keep_ratio_of(step, config)
    assert min(ends) <= ratio <= max(ends)
    assert ratio in ends or Fraction(str(ratio)) * 10_000 % 1 == 0
    assert ratio == ends[0] or step >= 10 + cycle
    assert ratio == ends[1] or step < 10 + steps + cycle


@given(warmup=st.integers(0, 50), cycle=st.integers(1, 40), dense=st.data(), start=st.integers(0, 200))
def test_every_whole_cycle_has_exactly_its_dense_steps_wherever_a_run_resumes(warmup, cycle, dense, start):
    dense_steps = dense.draw(st.integers(0, cycle))
    names = {"warmup_steps": warmup, "cycle_steps": cycle, "dense_steps": dense_steps}
    window = range(warmup + start, warmup + start + cycle)
    counts = Counter(phase_of(step, **names) for step in window)
    assert counts == Counter({"dense": dense_steps, "sparse": cycle - dense_steps})
    assert all(phase_of(step, **names) == "warmup" for step in range(warmup))
    # A pure function: any order, any number of calls.
    assert [phase_of(step, **names) for step in reversed(window)] == [phase_of(step, **names) for step in window][::-1]


SCATTERED = {"warmup_steps": 10, "cycle_steps": 32, "dense_steps": 5}


@given(seed=st.integers(0, 2**63 - 1), cycle=st.integers(1, 40), dense=st.data(), start=st.integers(0, 50))
def test_scattered_dense_steps_are_as_many_in_every_cycle_wherever_a_run_resumes(seed, cycle, dense, start):
    dense_steps = dense.draw(st.integers(0, cycle))
    names = {"warmup_steps": 7, "cycle_steps": cycle, "dense_steps": dense_steps, "scatter_seed": seed}
    window = range(7 + start * cycle, 7 + (start + 1) * cycle)
    phases = [phase_of(step, **names) for step in window]
    assert Counter(phases) == Counter({"dense": dense_steps, "sparse": cycle - dense_steps})
    assert [phase_of(step, **names) for step in reversed(window)] == phases[::-1]
    assert {phase_of(step, **names) for step in range(7)} == {"warmup"}


def test_every_place_of_a_cycle_is_dense_about_equally_often_and_cycles_differ():
    dense = Counter()
    patterns = set()
    for cycle in range(400):
        steps = range(10 + 32 * cycle, 42 + 32 * cycle)
        own = [n for n, step in enumerate(steps) if phase_of(step, **SCATTERED, scatter_seed=3) == "dense"]
        dense.update(own)
        patterns.add(tuple(own))
    assert len(patterns) > 390
    assert all(abs(dense[place] / 400 - 5 / 32) < 0.09 for place in range(32))  # five standard deviations


def test_the_seed_scatters_and_a_cool_down_stays_dense():
    one, other = ([phase_of(step, **SCATTERED, scatter_seed=seed) for step in range(500)] for seed in (1, 2))
    assert one != other
    cooled = [phase_of(step, **SCATTERED, scatter_seed=1, dense_from=400) for step in range(500)]
    assert cooled == one[:400] + ["dense"] * 100


def test_a_schedule_says_what_it_is():
    assert Schedule(**PAPER).describe() == "warm-up 100, then 16 of 128 steps dense"
    whole = Schedule(**PAPER, scatter_seed=1, dense_from=900).describe()
    assert whole == "warm-up 100, then 16 of 128 steps dense, scattered, all of them after iteration 900"


def test_the_scattered_schedule_is_frozen():
    """A resumed run must run dense what the first run would have run dense, whatever version it runs."""
    config = ReGateConfig(warmup_steps=0, cycle_steps=16, dense_steps=4, dense_at="random", seed=1234)
    dense = [step for step in range(32) if phase_in(step, config.schedule) == "dense"]
    assert dense == [3, 4, 11, 13, 23, 24, 26, 27]


@pytest.mark.parametrize(("mean", "spread"), [(0.25, 0.5), (0.1, 0.3), (0.5, 0.9)])
def test_drawn_ratios_have_the_mean_and_the_spread_that_were_asked_for(mean, spread):
    drawn = [drawn_ratio(mean, spread, seed=1, step=step) for step in range(4000)]
    assert all(0 < one <= 1 for one in drawn)
    found = sum(drawn) / len(drawn)
    deviation = (sum((one - found) ** 2 for one in drawn) / len(drawn)) ** 0.5
    assert found == pytest.approx(mean, abs=0.02)
    assert deviation == pytest.approx(spread * (mean * (1 - mean)) ** 0.5, rel=0.1)


def test_a_ratio_of_one_and_no_spread_draw_nothing():
    assert drawn_ratio(1.0, 0.5, seed=1, step=3) == 1.0
    assert drawn_ratio(0.3, 0.0, seed=1, step=3) == 0.3


def test_what_is_drawn_is_the_same_on_every_machine():
    assert [drawn_ratio(0.25, 0.5, seed=1234, step=step) for step in range(3)] == [0.0193, 0.2489, 0.3112]
