"""ms-swift's batches: labels that are not shifted yet, samples that begin where text positions do."""

from __future__ import annotations

import pytest
import torch

from regate_megatron.batches import QwenVLBatches, SwiftBatches
from tests.unit.test_visual import _plan

PICTURE, VIDEO = 91, 92
SWIFT = SwiftBatches(QwenVLBatches(PICTURE, VIDEO, merge_size=2, takes_positions=True))
FIRST, SECOND = [7, PICTURE, PICTURE, 8, 9, 6], [5, 4, 3, 2]
LABELS = [-100, -100, -100, -100, 9, 6], [-100, 4, 3, -100]


def _packed(fill: int = 0) -> dict:
    """Both rows as one, with what pads it to a multiple."""
    text = [*range(6), *range(4), *[0] * fill]
    tokens = torch.tensor([[*FIRST, *SECOND, *[0] * fill]])
    return {
        "input_ids": tokens,
        "labels": torch.tensor([[*LABELS[0], *LABELS[1], *[-100] * fill]]),
        "text_position_ids": torch.tensor([text]),
        "position_ids": torch.tensor([text]).expand(3, 1, -1),
        "seq_lens": [6, 4],
        "pixel_values": torch.ones(8, 6),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
    }


def _padded() -> dict:
    """The same rows, each in a row of its own."""
    text = torch.stack([torch.arange(6), torch.tensor([0, 1, 2, 3, 0, 0])])
    real = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    tokens = torch.tensor([FIRST, [*SECOND, 0, 0]])
    labels = torch.tensor([LABELS[0], [*LABELS[1], -100, -100]])
    packed = _packed()
    media = {name: packed[name] for name in ("pixel_values", "image_grid_thw", "seq_lens")}
    positions = {"text_position_ids": text, "position_ids": text.expand(3, -1, -1), "attention_mask_2d": real}
    return {"input_ids": tokens, "labels": labels} | positions | media


def _labels(facts) -> list[int]:
    """Those of all targets, in order of positions."""
    return facts.label_BS[facts.is_target_BS].tolist()


def test_a_label_is_a_target_where_it_is_predicted():
    facts = SWIFT.read(_padded())
    assert [torch.where(row)[0].tolist() for row in facts.is_target_BS] == [[3, 4], [0, 1]]
    assert _labels(facts) == [9, 6, 4, 3]


@pytest.mark.parametrize("fill", [0, 2])
def test_samples_of_a_packed_row_are_those_of_padded_rows(fill):
    rows, packed = SWIFT.read(_padded()), SWIFT.read(_packed(fill))
    assert packed.segment_length_N.tolist() == [6, 4 + fill]
    assert torch.equal(packed.difficulty_key_N2, rows.difficulty_key_N2)
    assert packed.media.sample_I.tolist() == [0]
    real_BS = packed.is_context_BS | packed.is_target_BS
    assert real_BS[0].tolist() == [True] * 10 + [False] * fill


def _for_two_context_ranks(*lengths: int, fill: int = 0) -> dict:
    """Samples of text in one row, as ms-swift packs them: counted, then filled up to multiples of 4, then the row."""
    filled = [length + -length % 4 for length in lengths]
    text = [*(place for length in filled for place in range(length)), *(place % 4 for place in range(fill))]
    tokens = torch.arange(2, 2 + len(text))[None]
    labels = torch.where(torch.tensor(text) > 2, tokens, -100)
    labels[:, sum(filled) :] = -100
    positions = {"text_position_ids": torch.tensor([text]), "position_ids": torch.tensor([text]).expand(3, 1, -1)}
    return {"input_ids": tokens, "labels": labels, "seq_lens": list(lengths)} | positions


@pytest.mark.parametrize("lengths", [(6, 4), (5, 5, 5, 4), (8, 3), (5,)])
def test_samples_that_were_filled_up_after_they_were_counted_are_whole(lengths):
    """What fills a sample counts as its own; no sample behind it loses a position, or its start."""
    facts = SWIFT.read(_for_two_context_ranks(*lengths))
    assert facts.segment_length_N.tolist() == [length + -length % 4 for length in lengths]
    assert bool((facts.is_context_BS | facts.is_target_BS).all())


@pytest.mark.parametrize("fill", [4, 8])
def test_what_fills_the_row_in_segments_that_context_ranks_cut_is_samples_without_a_position(fill):
    batch = _for_two_context_ranks(6, 4, fill=fill)
    facts, alone = SWIFT.read(batch), SWIFT.read(_for_two_context_ranks(6, 4))
    assert facts.segment_length_N.tolist() == [8, 4, *[4] * (fill // 4)]
    assert (facts.is_context_BS | facts.is_target_BS)[0].tolist() == [True] * 12 + [False] * fill
    assert torch.equal(facts.difficulty_key_N2[:2], alone.difficulty_key_N2)
    is_kept_S = torch.tensor([one == "x" for one in _plan(facts, keep_ratio=0.5)[0]])
    assert torch.equal(is_kept_S[:12], torch.tensor([one == "x" for one in _plan(alone, keep_ratio=0.5)[0]]))
    assert not is_kept_S[12:].any()


@pytest.mark.parametrize("fill", [0, 3])
def test_a_row_of_one_packed_sample_is_a_segment(fill):
    """The trainer has packing parameters for it, whose segments those of the short row have to be."""
    text = torch.tensor([[0, 1, 2, 3, *[0] * fill]])
    labels = torch.tensor([[-100, -100, 4, 5, *[-100] * fill]])
    positions = {"text_position_ids": text, "position_ids": text.expand(3, 1, -1), "seq_lens": [4]}
    facts = SWIFT.read({"input_ids": torch.arange(2, 6 + fill)[None], "labels": labels} | positions)
    assert facts.sample_BS.tolist() == [[0] * (4 + fill)]
    assert (facts.is_context_BS | facts.is_target_BS)[0].tolist() == [True] * 4 + [False] * fill


def test_a_padded_row_by_itself_is_no_segment():
    rows = {
        name: values[..., :1, :] for name, values in _padded().items() if torch.is_tensor(values) and values.dim() > 1
    }
    del rows["pixel_values"], rows["image_grid_thw"]
    rows["input_ids"] = torch.arange(6)[None]
    assert SWIFT.read(rows | {"seq_lens": [6]}).sample_BS is None


def test_more_samples_than_starts_are_refused():
    with pytest.raises(ValueError, match="3 seq_lens for 2 positions 0"):
        SWIFT.read(_packed() | {"seq_lens": [6, 2, 2]})


def test_what_has_no_weight_in_the_loss_is_no_target():
    batch = _padded() | {"loss_scale": torch.tensor([[1.0, 1, 1, 1, 0, 1], [1.0] * 6])}
    assert _labels(SWIFT.read(batch)) == [6, 4, 3]


def test_an_elided_target_loses_the_label_that_it_predicts_and_nothing_else_changes():
    batch = _packed()
    is_elided_BS = torch.zeros(1, 10, dtype=torch.bool)
    is_elided_BS[0, [4, 6]] = True
    elided = SWIFT.elide(batch, is_elided_BS)
    assert _labels(SWIFT.read(elided)) == [9, 3]
    assert all(elided[name] is batch[name] for name in batch if name != "labels") and batch["labels"][0, 5] == 6
