"""Plans: what is packed comes back, every position counts in the hash, masks leave the fill out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.method.plan import MicrobatchPlan, Packing, StepPlan
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.sharing import share_plan

ALONE = Topology(0, 1, True, 0, 1, None, None, None)


@st.composite
def plans(draw):
    microbatches = []
    for _ in range(draw(st.integers(0, 3))):
        dense, rows = draw(st.integers(1, 8)), draw(st.integers(1, 3))
        row = st.lists(st.booleans(), min_size=dense, max_size=dense)
        kept = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
        length = draw(st.integers(max(1, int(kept.sum(dim=1).max())), dense))
        microbatches.append((kept, MicrobatchPlan.of(kept, length)))
    step = draw(st.integers(0, 2**40))
    return [kept for kept, _ in microbatches], StepPlan(step, tuple(plan for _, plan in microbatches))


def _same(one: StepPlan, other: StepPlan) -> bool:
    return (one.step, len(one.microbatches)) == (other.step, len(other.microbatches)) and all(
        a.dense_length == b.dense_length
        and torch.equal(a.keep_idx_BK, b.keep_idx_BK)
        and torch.equal(a.is_kept_BK, b.is_kept_BK)
        for a, b in zip(one.microbatches, other.microbatches, strict=True)
    )


@given(plans())
def test_a_packed_plan_comes_back_whole(case):
    _, plan = case
    flat = plan.pack()
    assert flat.dtype == torch.int64 and flat.dim() == 1
    again = StepPlan.unpack(flat)
    assert _same(plan, again)
    assert again.digest() == plan.digest()
    assert again.is_sparse == plan.is_sparse == bool(plan.microbatches)


@given(plans())
def test_the_mask_of_a_plan_is_the_kept_positions_without_the_fill(case):
    kept, plan = case
    for mask, microbatch in zip(kept, plan.microbatches, strict=True):
        assert torch.equal(microbatch.kept_mask(), mask)
        assert microbatch.is_kept_BK.sum(dim=1).tolist() == mask.sum(dim=1).tolist()


def test_fill_at_position_0_does_not_mark_position_0_kept():
    plan = MicrobatchPlan.of(torch.tensor([[False, False, True, True], [True, False, False, True]]), 3)
    assert plan.keep_idx_BK.tolist() == [[2, 3, 0], [0, 3, 0]]
    assert plan.kept_mask().tolist() == [[False, False, True, True], [True, False, False, True]]
    assert plan.is_kept_BK.tolist() == [[True, True, False]] * 2
    assert plan.length == 3


def test_a_dense_microbatch_runs_its_dense_length():
    assert MicrobatchPlan(7).length == 7
    assert not StepPlan(3).is_sparse


def _kept(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "k" for letter in row] for row in rows])


def test_a_packed_row_fills_every_segment_at_its_own_end():
    packing = Packing(torch.tensor([5, 3]), torch.tensor([4, 2]))
    plan = MicrobatchPlan.of(_kept("k.k.k..k"), packing)
    assert plan.keep_idx_BK.tolist() == [[0, 2, 4, 0, 7, 5]]
    assert plan.is_kept_BK.tolist() == [[True, True, True, False, True, False]]
    assert plan.num_kept_N.tolist() == [3, 1] and plan.length == 6
    assert torch.equal(plan.kept_mask(), _kept("k.k.k..k"))
    again = StepPlan.unpack(StepPlan(2, (plan,)).pack())
    assert again.digest() == StepPlan(2, (plan,)).digest()
    assert torch.equal(again.microbatches[0].packing.length_N, packing.length_N)
    with pytest.raises(ValueError, match="more than"):
        MicrobatchPlan.of(_kept("kkkkk..."), packing)


@given(plans(), st.data())
def test_the_hash_changes_with_any_number_of_the_plan(case, data):
    _, plan = case
    if not plan.microbatches:
        return
    index = data.draw(st.integers(0, len(plan.microbatches) - 1))
    one = plan.microbatches[index]
    keep_idx_BK = one.keep_idx_BK.clone()
    keep_idx_BK.view(-1)[data.draw(st.integers(0, keep_idx_BK.numel() - 1))] += data.draw(st.sampled_from([1, 2**33]))
    others = list(plan.microbatches)
    others[index] = MicrobatchPlan(one.dense_length, keep_idx_BK, one.is_kept_BK)
    assert StepPlan(plan.step, tuple(others)).digest() != plan.digest()


def test_the_hash_tells_apart_one_position_order_shape_and_step():
    def digest(*rows, length=3, step=5):
        return StepPlan(step, (MicrobatchPlan.of(_kept(*rows), length),)).digest()

    base = digest("kk..", "..kk")
    others = [
        digest("kk..", ".k.k"),
        digest("..kk", "kk.."),
        digest("kk..", "...k"),
        digest("kk...", "..kk."),
        digest("kk..", "..kk", length=4),
        digest("kk..", "..kk", step=6),
        digest("kk....kk"[:4]),
        StepPlan(5).digest(),
    ]
    assert base == digest("kk..", "..kk")
    assert len({base, *others}) == 1 + len(others)
    assert len(base) == 32 and int(base, 16) >= 0


def test_two_microbatches_in_another_order_are_another_plan():
    first, second = MicrobatchPlan.of(_kept("k..."), 1), MicrobatchPlan.of(_kept(".k.."), 1)
    assert StepPlan(0, (first, second)).digest() != StepPlan(0, (second, first)).digest()


def test_a_replica_of_one_rank_shares_by_itself():
    plan = StepPlan(4)
    assert share_plan(plan, ALONE) is plan
