"""The planner on facts of packed rows: what is a sample's own, what context runs, and what it says of balance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regate_megatron import ReGateConfig
from regate_megatron.batches import MicrobatchFacts
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.planner import Planner
from regate_megatron.step.step import Step

ALONE = Topology(0, 1, True, 0, 1, None, None, None)


def _facts(*rows: str) -> MicrobatchFacts:
    """Rows of samples set apart by spaces: c context, t target, . padding (of the row's last sample)."""
    symbols = [list(row.replace(" ", "")) for row in rows]
    sample, samples = -1, []
    for row in rows:
        samples.append([])
        for text in row.split(" "):
            sample += 1
            samples[-1] += [sample] * len(text)
    is_target_BS = torch.tensor([[symbol == "t" for symbol in row] for row in symbols])
    key_N2 = torch.arange(2 * (sample + 1)).view(-1, 2)
    return MicrobatchFacts(
        is_target_BS=is_target_BS,
        is_context_BS=torch.tensor([[symbol == "c" for symbol in row] for row in symbols]),
        is_visual_BS=torch.zeros_like(is_target_BS),
        token_BS=torch.zeros_like(is_target_BS, dtype=torch.int64),
        position_id_BS=torch.zeros_like(is_target_BS, dtype=torch.int64),
        label_BS=torch.zeros_like(is_target_BS, dtype=torch.int64),
        reference_key_N2=key_N2,
        difficulty_key_N2=key_N2,
        sample_BS=torch.tensor(samples),
    )


PACKED = [_facts("cctttt ccctt."), _facts("ctttttttt ctc")]


def _plan(facts, number=5, **options):
    step = Step(number, "sparse", elides=True, facts=facts)
    Planner(ReGateConfig(score="random", length_multiple=1, **options), ALONE, 1).plan(step)
    assert not step.fallback
    kept = []
    for one, microbatch in zip(facts, step.plan.microbatches, strict=True):
        kept_BS = microbatch.kept_mask()
        held = [int((kept_BS & one.is_target_BS & (one.sample_BS == n)).sum()) for n in range(one.num_samples)]
        kept.append((held, int((kept_BS & one.is_context_BS).sum()), microbatch.length))
    return kept, step.balance


def test_per_sample_gives_each_sample_of_a_packed_row_its_share():
    kept, balance = _plan(PACKED, budget="per-sample")
    assert kept == [([2, 1], 5, 8), ([4, 1], 3, 8)]
    assert (balance.own, balance.slowest, balance.mean, balance.achievable) == (16, 16, 16.0, None)


@pytest.mark.parametrize("options", [{}, {"packed_ratio": "row"}, {"context": "read"}, {"keep_ratio": 0.2}])
@pytest.mark.parametrize("score", ["random", "student"])
def test_what_microbatches_ask_for_is_what_they_run_under_dealt_known_before_any_score(options, score):
    step = Step(5, "sparse", elides=True, facts=PACKED)
    planner = Planner(ReGateConfig(score=score, length_multiple=4, budget="dealt", **options), ALONE, 1)
    asked_M, key_M = planner.asked(step)
    assert step.scores is None
    planner.plan(step)
    assert asked_M.tolist() == [one.keep_idx_BK.numel() for one in step.plan.microbatches]
    assert key_M.tolist() == [int(one.difficulty_key_N2[0, 0]) for one in PACKED]


def test_in_a_dense_step_microbatches_ask_for_all_they_have():
    planner = Planner(ReGateConfig(score="student", deal_dense=True), ALONE, 1)
    asked_M, key_M = planner.asked(Step(5, "dense", elides=False, facts=PACKED))
    assert asked_M.tolist() == [one.is_target_BS.numel() for one in PACKED] and len(key_M) == len(PACKED)


def test_a_packed_row_that_counts_as_one_has_one_share():
    kept, _ = _plan(PACKED, budget="per-sample", packed_ratio="row")
    assert [(sum(held), context, length) for held, context, length in kept] == [(3, 5, 8), (5, 3, 8)]


@pytest.mark.parametrize("budget", ["per-sample", "dealt"])
@pytest.mark.parametrize("packed_ratio", ["sample", "row"])
def test_a_share_of_the_batch_leaves_each_its_floor_and_is_rounded_once(budget, packed_ratio):
    """Of 15 targets in samples of 4, 2, 8 and 1, or in rows of 6 and 9, half is 8."""
    found = set()
    for number in range(5, 25):
        kept, _ = _plan(PACKED, number, budget=budget, share="batch", packed_ratio=packed_ratio)
        held = [count for own, _, _ in kept for count in own]
        assert sum(held) == 8
        if packed_ratio == "row":
            assert sum(kept[0][0]) >= 2 and sum(kept[1][0]) >= 3
        else:
            assert all(own >= least for own, least in zip(held, (1, 1, 2, 1), strict=True))
        found.add(tuple(held))
    assert len(found) > 3


def test_what_microbatches_ask_for_under_dealt_is_what_they_run_where_the_share_is_the_batchs():
    planner = Planner(ReGateConfig(score="random", length_multiple=1, budget="dealt", share="batch"), ALONE, 1)
    step = Step(5, "sparse", elides=True, facts=PACKED)
    asked_M, _ = planner.asked(step)
    scores = [one.clone() for one in step.scores]
    planner.follow(step, np.array([[0, 1]]))
    planner.plan(step)
    assert all(torch.equal(*pair) for pair in zip(scores, step.scores, strict=True))
    assert asked_M.tolist() == [one.keep_idx_BK.numel() for one in step.plan.microbatches]


def test_scores_follow_microbatches_to_their_new_place():
    planner = Planner(ReGateConfig(score="student", length_multiple=1, budget="dealt", share="batch"), ALONE, 1)
    step = Step(5, "sparse", elides=True, facts=PACKED)
    planner.asked(step)
    step.scores = tuple(torch.arange(one.num_targets).double() + 100 * at for at, one in enumerate(PACKED))
    before = {name: getattr(step, name) for name in ("scores", "above", "is_known")}
    step.take_facts(PACKED[::-1])
    planner.follow(step, np.array([[1, 0]]))
    assert step.reference is None
    for name, each in before.items():
        for one, other in zip(each[::-1], getattr(step, name), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("budget", ["uniform", "balanced"])
def test_samples_of_packed_rows_keep_their_floors(budget):
    kept, balance = _plan(PACKED, budget=budget)
    (first, *_), (second, *_) = kept
    assert first[0] >= 1 and first[1] >= 1 and second[0] >= 2 and second[1] >= 1
    assert sum(length for _, _, length in kept) == balance.own == 16
    assert balance.achievable == (1.0 if budget == "balanced" else None)


@pytest.mark.parametrize("budget", ["per-sample", "uniform", "balanced", "dealt"])
def test_context_after_the_last_target_of_a_row_can_be_left_out(budget):
    facts = [_facts("cttccccc"), _facts("cccccccc")]
    every, read = (_plan(facts, budget=budget, context=context)[0] for context in ("all", "read"))
    assert [context for _, context, _ in every] == [6, 8]
    assert [context for _, context, _ in read] == [1, 0]
    assert every[1][2] == 8 and read[1][2] <= 2


def test_the_share_is_that_of_the_step():
    moving = {"keep_ratio": 0.25, "keep_ratio_end": 0.75, "keep_ratio_steps": 200, "warmup_steps": 0}
    shares = [_plan([_facts("cttttttttttttttttt")], step, **moving)[0] for step in (127, 128, 256)]
    assert [held for [(held, _, _)] in shares] == [[5], [10], [13]]  # of 17: a quarter, 0.57, three quarters
