"""Counts and the log line: what is run, kept and balanced, over steps and data-parallel ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import MicrobatchFacts
from regate_megatron.method.plan import MicrobatchPlan, Packing, StepPlan
from regate_megatron.step.counters import Counters, count_step, has_history, log_line, no_history, ratios
from regate_megatron.step.step import Balance, Step
from regate_megatron.step.trace import Trace

FACTS = SimpleNamespace(
    is_target_BS=torch.tensor([[False, True, True, True]]),
    num_targets=3,
    is_context_BS=torch.tensor([[True, False, False, False]]),
    is_visual_BS=torch.tensor([[True, False, False, False]]),
    sample_BS=None,
)
SPARSE = StepPlan(3, (MicrobatchPlan.of(torch.tensor([[True, False, True, False]]), 3),))  # one slot of fill


def _step(own: int, slowest: int, mean: float, achievable: float | None = None) -> Counters:
    balance = Balance(slowest, own, mean, achievable)
    return _counted(FACTS, SPARSE, balance)


def _counted(facts, plan: StepPlan, balance: Balance | None = None) -> Counters:
    step = Step(plan.step, "sparse", elides=True, facts=[facts], balance=balance)
    step.plan = plan
    return count_step(step, num_layers=4, dense_layers=1)


def _interval(*steps: Counters) -> Counters:
    total = Counters()
    for step in steps:
        total.add(step)
    return total


def test_fill_is_run_and_not_kept():
    counters = _step(3, 3, 3.0)
    assert (counters.targets_total, counters.targets_kept) == (3, 1)
    assert (counters.positions_dense, counters.positions_run) == (4, 3)
    assert ratios(counters)["regate/dense-equivalent"] == (4 + 3 * 3) / 16


def test_visual_positions_are_told_where_there_are_any():
    facts = SimpleNamespace(
        is_target_BS=torch.tensor([[False, False, False, True]]),
        num_targets=1,
        is_visual_BS=torch.tensor([[True, True, True, False]]),
        sample_BS=None,
    )
    plan = StepPlan(3, (MicrobatchPlan.of(torch.tensor([[False, True, False, True]]), 3),))
    sparse, dense = _counted(facts, plan), _counted(facts, StepPlan(4))
    assert (sparse.visual_total, sparse.visual_kept, dense.visual_kept) == (3, 1, 3)
    assert ratios(sparse)["regate/visual-kept"] == pytest.approx(1 / 3)
    assert "| visual kept 4/6 (66.7%) |" in log_line(4, "sparse", _interval(sparse, dense), Counters())
    text = _counted(SimpleNamespace(**vars(FACTS) | {"is_visual_BS": torch.zeros(1, 4, dtype=torch.bool)}), SPARSE)
    assert "visual" not in log_line(4, "sparse", text, Counters()) and "regate/visual-kept" not in ratios(text)


def test_max_mean_compares_the_slowest_rank_of_every_step():
    """Two ranks that take turns at being the slower one are not balanced, though their sums are."""
    ranks = [_interval(_step(90, 110, 100.0), _step(110, 110, 100.0))]
    ranks += [_interval(_step(110, 110, 100.0), _step(90, 110, 100.0))]
    assert ratios(_interval(*ranks))["regate/max-mean-positions"] == 1.1
    assert "| max/mean over ranks 1.100 |" in log_line(4, "sparse", _interval(*ranks), Counters())


def test_what_was_achievable_stands_beside_it_where_that_is_not_balanced():
    ranks = _interval(_step(100, 150, 125.0, 1.2), _step(150, 150, 125.0, 1.2))
    assert "| max/mean over ranks 1.200 (at best 1.200) |" in log_line(4, "sparse", ranks, Counters())
    ranks = _interval(_step(100, 102, 101.0, 1.0), _step(102, 102, 101.0, 1.0))
    assert "| max/mean over ranks 1.010 |" in log_line(4, "sparse", ranks, Counters())


def test_dense_steps_say_nothing_of_balance():
    counters = _counted(FACTS, StepPlan(0))
    assert "max/mean" not in log_line(1, "dense", counters, Counters())
    assert ratios(counters)["regate/max-mean-positions"] == 1.0


def test_counters_travel_as_numbers():
    counters = _step(90, 110, 100.0, 1.3)
    assert Counters.from_tensor(counters.to_tensor()) == counters


def test_packed_rows_count_the_squares_of_their_segments():
    """Attention does not cross segments: two of 2 are less work than one of 4."""
    facts = SimpleNamespace(
        is_target_BS=FACTS.is_target_BS,
        num_targets=3,
        is_visual_BS=FACTS.is_visual_BS,
        sample_BS=torch.tensor([[0, 0, 1, 1]]),
        segment_length_N=torch.tensor([2, 2]),
    )
    dense = _counted(facts, StepPlan(3))
    assert (dense.positions_dense, dense.layer_squares_dense) == (4, 4 * 8)
    packing = Packing(torch.tensor([2, 2]), torch.tensor([1, 2]))
    plan = StepPlan(3, (MicrobatchPlan.of(torch.tensor([[True, False, True, True]]), packing),))
    sparse = _counted(facts, plan)
    assert (sparse.positions_run, sparse.layer_squares_run) == (3, 8 + 3 * 5)


def _facts(is_target_BS: torch.Tensor, **joined) -> MicrobatchFacts:
    key_N2, empty = torch.arange(4).view(2, 2), {"is_visual_BS", "token_BS", "position_id_BS", "label_BS"}
    fields = {name: torch.zeros_like(is_target_BS) for name in empty}
    keys = {"reference_key_N2": key_N2, "difficulty_key_N2": key_N2}
    return MicrobatchFacts(is_target_BS=is_target_BS, is_context_BS=~is_target_BS, **fields, **keys, **joined)


def test_rows_that_context_parallelism_joins_are_traced_as_rows(tmp_path):
    is_target_BS = torch.tensor([[False, True, True, True], [False, False, True, True]])
    kept_BS = torch.tensor([[True, False, True, False], [True, True, False, True]])
    rows = _facts(is_target_BS), MicrobatchPlan.of(kept_BS, 3)
    joined = _facts(is_target_BS.view(1, 8), sample_BS=torch.tensor([[0] * 4 + [1] * 4]), joins_rows=True)
    packing = Packing(torch.tensor([4, 4]), torch.tensor([3, 3]))
    records = []
    for rank, (facts, plan) in enumerate((rows, (joined, MicrobatchPlan.of(kept_BS.view(1, 8), packing)))):
        trace = Trace(str(tmp_path), rank, 2)
        step = Step(3, "sparse", elides=True, facts=[facts], scores=[torch.arange(5.0, dtype=torch.float64)])
        step.plan = StepPlan(3, (plan,))
        trace.write(step)
        trace.close()
        record = json.loads((tmp_path / f"dp{rank:05d}.jsonl").read_text())
        assert (record["iteration"], record["dp_rank"]) == (4, rank)
        records.append({name: value for name, value in record.items() if name not in ("plan_hash", "dp_rank")})
    assert records[0] == records[1]
    assert records[1]["rows"][1]["kept"] == [0, 1, 3] and records[1]["kept_length"] == 3


def test_what_was_known_before_a_step_is_a_line_of_its_own(tmp_path):
    facts = _facts(torch.tensor([[False, True, True, True], [False, False, True, True]]))
    trace, known = Trace(str(tmp_path), 0, 1), torch.tensor([True, False, True, True, False])
    for number, fields in enumerate(({}, {"is_known": [known], "num_asked": 2, "num_found": 1}, {"num_asked": 2})):
        trace.write(Step(number, "sparse", elides=True, facts=[facts], **fields))
    trace.close()
    assert (tmp_path / "dp00000.history.csv").read_text().splitlines() == [
        "iteration,targets,targets_with_history,references_asked,references_found",
        "2,5,3,2,1",
        "3,5,0,2,0",
    ]


def test_a_run_from_the_start_leaves_no_traces_of_ranks_it_has_not_and_a_resumed_one_leaves_all(tmp_path):
    facts = _facts(torch.tensor([[False, True, True, True], [False, False, True, True]]))
    before = [tmp_path / f"dp{rank:05d}.{kind}" for rank in (1, 2, 13) for kind in ("jsonl", "history.csv")]
    before.append(tmp_path / "dp.txt")
    for continues, left in ((True, before), (False, [*before[:2], before[-1]])):
        for file in before:
            file.write_text("of a run before")
        trace = Trace(str(tmp_path), 0, 2)
        trace.continues = continues
        trace.write(Step(0, "dense", elides=False, facts=[facts]))
        trace.close()
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "dp00000.jsonl", *left])


def test_the_log_line_says_how_much_was_known():
    counters = Counters(steps=1, targets_scored=8, targets_known=2, references_asked=4, references_found=3)
    counters.visual_scored, counters.visual_known = 50, 20
    assert (
        "| targets with history 25.0% | visual positions with history 40.0% | reference losses found 75.0% |"
        in log_line(4, "sparse", counters, Counters())
    )
    assert "history" not in log_line(4, "dense", Counters(steps=1), Counters())


def test_a_run_whose_samples_never_come_back_is_told_what_to_do():
    never, some = Counters(targets_scored=1000, targets_known=9), Counters(targets_scored=1000, targets_known=10)
    assert has_history(some) and not has_history(never)
    line = no_history(never)
    assert line.startswith("[regate] only 0.9% of the targets have a history") and "--regate-sample-key text" in line
