"""The schedule: warm-up, then cycles that begin dense and go on sparse."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.schedule import mean_kept_share, phase_of

PAPER = {"warmup_steps": 100, "cycle_steps": 128, "dense_steps": 16}


def test_the_papers_schedule_step_by_step():
    phases = [phase_of(step, **PAPER) for step in range(100 + 2 * 128)]
    cycle = ["dense"] * 16 + ["sparse"] * 112
    assert phases == ["warmup"] * 100 + cycle + cycle


def test_the_papers_mean_share_is_0_5625():
    assert mean_kept_share(0.5, cycle_steps=128, dense_steps=16) == 0.5625


def test_without_warm_up_the_first_cycle_begins_at_step_0():
    phases = [phase_of(step, warmup_steps=0, cycle_steps=2, dense_steps=1) for step in range(4)]
    assert phases == ["dense", "sparse"] * 2


def test_no_dense_steps_means_all_sparse_and_a_full_cycle_of_them_means_all_dense():
    assert {phase_of(step, warmup_steps=0, cycle_steps=5, dense_steps=0) for step in range(12)} == {"sparse"}
    assert {phase_of(step, warmup_steps=0, cycle_steps=5, dense_steps=5) for step in range(12)} == {"dense"}
    assert mean_kept_share(0.25, cycle_steps=5, dense_steps=0) == 0.25
    assert mean_kept_share(0.25, cycle_steps=5, dense_steps=5) == 1.0


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


@given(ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0]), cycle=st.integers(1, 64), dense=st.data())
def test_the_mean_share_is_the_mean_over_one_cycle(ratio, cycle, dense):
    dense_steps = dense.draw(st.integers(0, cycle))
    share = {"dense": 1.0, "sparse": ratio}
    phases = [phase_of(step, warmup_steps=0, cycle_steps=cycle, dense_steps=dense_steps) for step in range(cycle)]
    expected = sum(share[phase] for phase in phases) / cycle
    assert mean_kept_share(ratio, cycle_steps=cycle, dense_steps=dense_steps) == pytest.approx(expected)
