"""All of a step at once: it is read as its microbatches are, and says of all what each says of itself."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.batches import GPTBatches, MicrobatchFacts, NamedSamples, StepFacts
from regate_megatron.batches.facts import read_by_targets

POSITIONS = {
    "none": lambda index: {},
    "usual": lambda index: {"position_ids": torch.arange(8).expand(2, 8)},
    "moved": lambda index: {"position_ids": torch.arange(8).expand(2, 8) + index},
    "mrope": lambda index: {"position_ids": (torch.arange(8) // 2).expand(3, 2, 8) + index},
}


def _batches(count: int, positions: str = "none", rows: int = 2, length: int = 8, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        token_BS = torch.randint(0, 9, (rows, length), generator=generator)
        token_BS[:, -2:] = 0
        mask_BS = torch.randint(0, 2, (rows, length), generator=generator).float()
        mask_BS[:, -3:] = 0
        own = {"tokens": token_BS, "labels": token_BS.roll(-1, 1), "loss_mask": mask_BS}
        batches.append(own | POSITIONS[positions](index))
    return batches


def _packed(count: int) -> list[dict]:
    cu_seqlens = torch.tensor([[0, 3, 8], [0, 4, 8]])
    return [dict(batch, cu_seqlens=cu_seqlens) for batch in _batches(count, seed=3)]


STEPS = {name: _batches(3, name) for name in POSITIONS}
STEPS |= {"packed": _packed(2), "lengths that differ": [*_batches(1), *_batches(2, length=6)]}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("adapter", [GPTBatches(), GPTBatches(True), NamedSamples(GPTBatches(), "text")], ids=str)
def test_microbatches_read_together_are_those_read_alone(adapter, name):
    together, alone = adapter.read_all(STEPS[name]), [adapter.read(batch) for batch in STEPS[name]]
    for one, other in zip(together, alone, strict=True):
        for field in fields(MicrobatchFacts):
            got, expected = getattr(one, field.name), getattr(other, field.name)
            if torch.is_tensor(expected):
                assert got.dtype == expected.dtype and torch.equal(got, expected), field.name
            elif field.name != "media":
                assert got == expected, field.name


def test_a_batch_of_another_layout_is_told_as_when_it_is_read_alone():
    with pytest.raises(KeyError, match="labels"):
        GPTBatches().read_all([{"tokens": torch.zeros(2, 4)}] * 2)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_says_what_its_microbatches_say(name):
    each = GPTBatches().read_all(STEPS[name])
    step = StepFacts(each)
    assert torch.equal(step.num_target_N, torch.cat([one.num_target_N for one in each]))
    assert torch.equal(step.label_X, torch.cat([one.label_BS[one.is_target_BS] for one in each]))
    places = [place - one.start_N[sample] for one in each for sample, place in _targets(one)]
    assert step.place_X.tolist() == places
    assert step.num_target_M == [one.num_targets for one in each]
    assert torch.equal(step.key_M, torch.stack([one.difficulty_key_N2[0, 0] for one in each]))
    rows, before = [], 0
    for one in each:
        rows.append(one.planned_row_N + before)
        before = int(rows[-1][-1]) + 1
    assert torch.equal(step.planned_row_N, torch.cat(rows))
    assert torch.equal(step.count_by_row(step.is_target_P), torch.cat([one.is_target_BS.sum(dim=1) for one in each]))


def _targets(facts: MicrobatchFacts) -> list[tuple[int, int]]:
    """Sample and place in its row of each target, in order."""
    row_X, place_X = torch.where(facts.is_target_BS)
    sample_X = row_X if facts.sample_BS is None else facts.sample_BS[row_X, place_X]
    return list(zip(sample_X.tolist(), place_X.tolist(), strict=True))


@given(
    st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
    )
)
def test_a_position_is_read_if_a_target_of_its_row_is_there_or_later(rows):
    expected = [[any(row[place:]) for place in range(len(row))] for row in rows]
    assert read_by_targets(torch.tensor(rows)).tolist() == expected
