"""Adapters of examples/multimodal and of Megatron-Bridge's Qwen-VL: what they read, and that they edit losses only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import (
    GPTBatches,
    LLaVABatches,
    MultimodalBatches,
    PaddedRows,
    QwenVLBatches,
    StepFacts,
)

IMAGE, PAD, IGNORE = -200, 0, -100


# ------------------------------------------------------------------------------------------- examples/multimodal


def _multimodal(*rows: tuple[list[int], list[int]], images: bool = True, length: int = 7) -> dict[str, torch.Tensor]:
    """Rows of (tokens, labels not yet shifted); every placeholder has an image of ones."""
    tokens, labels = torch.full((len(rows), length), PAD), torch.full((len(rows), length + 1), PAD)
    for row, (text, target) in enumerate(rows):
        tokens[row, : len(text)], labels[row, : len(target)] = torch.tensor(text), torch.tensor(target)
    count, dummy = sum(text.count(IMAGE) for text, _ in rows), torch.zeros(1, 1, dtype=torch.int32)
    return {
        "__key__": ["a"] * len(rows),
        "tokens": tokens,
        "labels": labels,
        "imgs": torch.ones(count, 3, 2, 2) if images else torch.zeros(1, 1),
        "num_tiles": torch.ones(count, dtype=torch.int32) if images else dummy,
        "cu_lengths": dummy,
        "max_lengths": dummy,
    }


PICTURE = ([IMAGE, 5, 6, 7, 8], [IGNORE, IGNORE, 6, 7, 8])  # an image, a prompt of one word, an answer of three
TEXT_ONLY = ([5, 6, 7, 8], [IGNORE, 6, 7, 8])


def _adapter() -> MultimodalBatches:
    return MultimodalBatches(LLaVABatches(2, IMAGE, 99, False), PAD)


def test_labels_of_multimodal_batches_are_shifted_and_make_the_loss_mask():
    facts = _adapter().read(_multimodal(PICTURE))
    # merged row: two visual positions, then 5 6 7 8 and padding; 5 predicts 6, 6 predicts 7, 7 predicts 8
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [2, 3, 4]
    assert facts.label_BS[facts.is_target_BS].tolist() == [6, 7, 8]
    assert torch.where(facts.is_visual_BS[0])[0].tolist() == [0, 1]


def test_dummy_image_of_a_text_batch_is_no_image():
    facts = _adapter().read(_multimodal(TEXT_ONLY, images=False))
    assert not facts.is_visual_BS.any() and facts.label_BS[facts.is_target_BS].tolist() == [6, 7, 8]


def test_an_elided_target_of_a_multimodal_batch_loses_its_label_and_nothing_else_changes():
    adapter, batch = _adapter(), _multimodal(PICTURE, TEXT_ONLY)
    before = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
    facts = adapter.read(batch)
    is_elided_BS = torch.zeros_like(facts.is_target_BS)
    is_elided_BS[0, 3] = is_elided_BS[1, 0] = True
    elided = adapter.elide(batch, is_elided_BS)
    assert elided["labels"][0].tolist() == [IGNORE, IGNORE, 6, IGNORE, 8, 0, 0, 0]
    assert elided["labels"][1].tolist() == [IGNORE, IGNORE, 7, 8, 0, 0, 0, 0]
    assert all(elided[name] is batch[name] for name in batch if name != "labels")
    assert all(torch.equal(batch[n], before[n]) for n in batch if torch.is_tensor(batch[n])), "the batch was edited"
    left = adapter.read(elided).is_target_BS
    assert torch.equal(left, facts.is_target_BS & ~is_elided_BS)


def test_a_label_below_0_that_is_not_the_ignored_one_is_no_target():
    """The script's loss mask knows -100 and the pad id alone: Megatron trains on any other, and so it runs."""
    batch = _multimodal(([IMAGE, 5, 6, 7, 8], [IGNORE, IGNORE, 6, -7, 8]))
    facts = _adapter().read(batch)
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [2, 4]
    assert facts.is_context_BS[0].tolist()[:5] == [True, True, False, True, False]


def test_llava_labels_below_0_are_no_targets():
    batch = {
        "tokens": torch.tensor([[IMAGE, 5, 6, 7, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, IGNORE, IGNORE, IGNORE]]),
        "loss_mask": torch.ones(1, 6),
        "image": torch.zeros(1, 3, 2, 2),
    }
    adapter = LLaVABatches(2, IMAGE, 99, False)
    facts = adapter.read(batch)  # merged: two visual positions, then 5 6 7 and two of padding that have a loss
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [2, 3]
    assert torch.equal(facts.is_context_BS, ~facts.is_target_BS)
    habit = adapter.read(dict(batch, loss_mask=torch.tensor([[0, 1, 1, 0, 0, 0.0]])))
    assert torch.equal(facts.reference_key_N2, habit.reference_key_N2)
    assert torch.equal(facts.difficulty_key_N2, habit.difficulty_key_N2)


def _captions(*rows: tuple[list[int], list[int]], fill: int = 0) -> dict[str, torch.Tensor]:
    """Rows one after the other, as the script's task encoder packs them; pictures of two merged positions."""
    tokens, labels = (sum((list(row[which]) for row in rows), []) for which in (0, 1))
    ends = [0]
    for text, _ in rows:
        ends.append(ends[-1] + len(text) + text.count(IMAGE))
    return _multimodal((tokens, labels), length=len(tokens) + fill) | {"cu_lengths": torch.tensor([ends])}


@pytest.mark.parametrize("fill", [0, 3])
def test_packed_multimodal_samples_are_those_of_padded_rows(fill):
    rows, packed = (
        _adapter().read(_multimodal(PICTURE, TEXT_ONLY)),
        _adapter().read(_captions(PICTURE, TEXT_ONLY, fill=fill)),
    )
    assert packed.sample_BS.tolist() == [[0] * 6 + [1] * 4 + [2] * fill]
    assert torch.equal(packed.difficulty_key_N2[:2], rows.difficulty_key_N2)
    assert torch.equal(packed.reference_key_N2[:2], rows.reference_key_N2)
    assert torch.where(packed.is_target_BS[0])[0].tolist() == [2, 3, 4, 6, 7, 8]
    assert packed.label_BS[packed.is_target_BS].tolist() == [6, 7, 8] * 2
    assert (packed.is_target_BS | packed.is_context_BS)[0].tolist() == [True] * 10 + [False] * fill
    assert packed.media.sample_I.tolist() == [0] and not packed.joins_rows


def test_pictures_of_packed_samples_belong_to_them():
    facts = _adapter().read(_captions(TEXT_ONLY, PICTURE, PICTURE))
    assert facts.media.sample_I.tolist() == [1, 2] and facts.media.count_I.tolist() == [2, 2]
    assert torch.equal(facts.difficulty_key_N2[1], facts.difficulty_key_N2[2])


def test_an_elided_target_of_a_packed_row_loses_its_label():
    adapter, batch = _adapter(), _captions(TEXT_ONLY, PICTURE)
    is_elided_BS = torch.zeros(1, 10, dtype=torch.bool)
    is_elided_BS[0, [1, 7]] = True
    assert adapter.elide(batch, is_elided_BS)["labels"][0].tolist() == [
        IGNORE,
        6,
        IGNORE,
        8,
        IGNORE,
        IGNORE,
        6,
        IGNORE,
        8,
        0,
    ]


@pytest.mark.parametrize("starts", [[0, 1, 10], [0, 6, 11], [1, 6, 10]])
def test_starts_of_packed_samples_that_are_no_starts_of_entries_are_said(starts):
    with pytest.raises(ValueError, match="cu_lengths"):
        _adapter().read(_captions(PICTURE, TEXT_ONLY) | {"cu_lengths": torch.tensor([starts])})


def test_packed_rows_are_refused_where_the_script_forgets_their_starts():
    """Under sequence or context parallelism train.py makes packing parameters of the whole row instead."""
    adapter = MultimodalBatches(LLaVABatches(2, IMAGE, 99, False, multiple=2), PAD)
    with pytest.raises(ValueError, match="packed rows under sequence or context parallelism"):
        adapter.read(_captions(PICTURE, TEXT_ONLY))


def test_batches_with_a_loss_mask_pass_through():
    batch = {
        "tokens": torch.tensor([[5, 6]]),
        "labels": torch.tensor([[6, 7]]),
        "loss_mask": torch.tensor([[0.0, 1.0]]),
    }
    assert _adapter().read(batch).is_target_BS.tolist() == [[False, True]]
    assert _adapter().elide(batch, torch.tensor([[False, True]]))["loss_mask"].tolist() == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------ Qwen-VL

PICTURE_TOKEN, VIDEO_TOKEN = 91, 92


class _Visual(SimpleNamespace):
    """Stands where Megatron-Bridge's ``GenericVisualInputs`` does: non-empty fields, flat."""

    def normalized_for_model(self):
        return {name: value for name, value in vars(self).items() if value is not None}


def _grid(*sizes: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(sizes)


def _pixels(*values: float, patches: int) -> torch.Tensor:
    return torch.cat([torch.full((patches, 6), value) for value in values])


def _qwen(rows: list[list[int]], masks: list[list[float]], **visual) -> dict:
    tokens = torch.tensor(rows)
    mask = torch.tensor(masks)
    labels = torch.cat([tokens[:, 1:], torch.full((len(rows), 1), IGNORE)], dim=1).masked_fill(mask == 0, IGNORE)
    inputs = _Visual(**visual) if visual else None
    return {"input_ids": tokens, "labels": labels, "loss_mask": mask, "visual_inputs": inputs}


QWEN = QwenVLBatches(PICTURE_TOKEN, VIDEO_TOKEN, merge_size=2)
ROW, MASK = [7, PICTURE_TOKEN, PICTURE_TOKEN, 8, 9, 6], [0, 0, 0, 1, 1, 0]
OTHER, OTHER_MASK = [PICTURE_TOKEN, PICTURE_TOKEN, 7, 8, 5, 4], [0, 0, 0, 1, 1, 0]
TWO_BY_FOUR = (1, 2, 4)  # eight patches, two visual tokens


def _one(value: float) -> dict:
    visual = {"pixel_values": _pixels(value, patches=8), "image_grid_thw": _grid(TWO_BY_FOUR)}
    return _qwen([ROW], [MASK], **visual)


def _pair(first: float, second: float) -> dict:
    pixels = _pixels(first, second, patches=8)
    grid = _grid(TWO_BY_FOUR, TWO_BY_FOUR)
    return _qwen([ROW, OTHER], [MASK, OTHER_MASK], pixel_values=pixels, image_grid_thw=grid)


def test_qwen_placeholders_are_visual_context_and_answers_are_targets():
    facts = QWEN.read(_one(1.0))
    assert torch.where(facts.is_visual_BS[0])[0].tolist() == [1, 2]
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [3, 4]
    assert facts.label_BS[facts.is_target_BS].tolist() == [9, 6]
    assert torch.equal(facts.is_context_BS, ~facts.is_target_BS)


def test_qwen_keys_tell_pixels_apart_and_do_not_depend_on_the_batch():
    alone, other, pair = QWEN.read(_one(1.0)), QWEN.read(_one(2.0)), QWEN.read(_pair(1.0, 3.0))
    assert torch.equal(alone.reference_key_N2, other.reference_key_N2)
    assert not torch.equal(alone.difficulty_key_N2, other.difficulty_key_N2)
    assert torch.equal(alone.difficulty_key_N2[0], pair.difficulty_key_N2[0])
    swapped = QWEN.read(_pair(1.0, 4.0))
    assert torch.equal(pair.difficulty_key_N2[0], swapped.difficulty_key_N2[0])
    assert not torch.equal(pair.difficulty_key_N2[1], swapped.difficulty_key_N2[1])


def test_qwen_reference_key_depends_on_the_grid():
    """Another grid of as many patches gives the text other positions."""
    wide = QWEN.read(_one(1.0))
    tall = QWEN.read(_qwen([ROW], [MASK], pixel_values=_pixels(1.0, patches=8), image_grid_thw=_grid((1, 4, 2))))
    assert not torch.equal(wide.reference_key_N2, tall.reference_key_N2)


def test_rows_without_pictures_do_not_take_those_of_others():
    text = [7, 8, 9, 5, 4, 3]
    visual = {"pixel_values": _pixels(1.0, patches=8), "image_grid_thw": _grid(TWO_BY_FOUR)}
    mixed = QWEN.read(_qwen([text, ROW, text], [MASK] * 3, **visual))
    alone = QWEN.read(_qwen([text], [MASK]))
    assert torch.equal(mixed.difficulty_key_N2[[0, 2]], alone.difficulty_key_N2.expand(2, -1))
    assert torch.equal(mixed.difficulty_key_N2[1], QWEN.read(_one(1.0)).difficulty_key_N2[0])


def test_qwen_padding_is_told_by_the_mask_where_there_is_one():
    """The processor pads with one id, the collator behind it with another."""
    row = [7, 8, 9, 2, 2, 0]
    batch = dict(_qwen([row], [[0, 1, 0, 0, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]]))
    assert QWEN.read(batch).is_context_BS.tolist() == [[True, False, True, False, False, False]]


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 1, 1, 0]])], ids=["told by tokens", "told by a mask"])
def test_qwen_labels_below_0_are_no_targets(mask):
    plain = dict(_one(1.0), attention_mask=mask)
    habit = dict(plain, loss_mask=torch.ones(1, 6))  # the labels are -100 already where nothing is predicted
    facts, usual = QWEN.read(habit), QWEN.read(plain)
    assert torch.equal(facts.is_target_BS, usual.is_target_BS) and bool((facts.label_BS[facts.is_target_BS] >= 0).all())
    assert torch.equal(facts.is_context_BS, ~facts.is_target_BS)
    assert torch.equal(facts.difficulty_key_N2, usual.difficulty_key_N2)


def test_loss_at_a_visual_position_stays_context():
    batch = _one(1.0)
    batch["loss_mask"][0, 2] = 1
    facts = QWEN.read(batch)
    assert not facts.is_target_BS[0, 2] and facts.is_context_BS[0, 2]


def _both_kinds() -> dict:
    """A video of two frames and a picture in one row, a picture in the next; each patch holds its number."""
    rows = [
        [7, *[VIDEO_TOKEN] * 4, 8, PICTURE_TOKEN, PICTURE_TOKEN, 9, 6],
        [PICTURE_TOKEN, PICTURE_TOKEN, 7, 8, 5, 4, 3, 2, 1, 1],
    ]
    masks = [[0, 0, 0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]]
    numbers = torch.arange(16.0)[:, None].expand(-1, 6)
    return _qwen(
        rows,
        masks,
        pixel_values=numbers,
        image_grid_thw=_grid(TWO_BY_FOUR, TWO_BY_FOUR),
        pixel_values_videos=100 + numbers,
        video_grid_thw=_grid((2, 2, 4)),
    )


def test_qwen_media_are_images_and_videos_in_the_order_of_their_positions_with_merged_grids():
    facts = QWEN.read(_both_kinds())
    media = facts.media
    assert media.grid_I3.tolist() == [[2, 1, 2], [1, 1, 2], [1, 1, 2]]
    assert media.count_I.tolist() == [4, 2, 2] and media.sample_I.tolist() == [0, 0, 1]
    assert media.lead_I.tolist() == [0] * 3
    assert StepFacts([facts]).place_V.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    # four patches of six values under each position
    assert [sorted(set(place.tolist())) for place in media.pixels(0)] == [
        [100 + 4 * n + k for k in range(4)] for n in range(4)
    ]
    assert media.pixels(1)[0].tolist() == [n for n in range(4) for _ in range(6)]
    assert set(media.pixels(2)[1].tolist()) == {12, 13, 14, 15}


def test_qwen_visual_position_with_a_loss_is_told():
    facts = QWEN.read(_both_kinds())
    assert torch.where(facts.has_visual_loss_BS) == (torch.tensor([0]), torch.tensor([7]))


def test_qwen_text_has_no_media():
    facts = QWEN.read(_qwen([[7, 8, 9, 5]], [[0, 1, 1, 0]]))
    assert len(facts.media.count_I) == len(StepFacts([facts]).medium_V) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seqlens": torch.tensor([[0, 3, 6]])}, "packed offline"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, "run from 0 to 6"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 6])}, r"cu_seqlens_q \[0, 3, 2, 6\]"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3, 3]), "cu_seqlens_q_padded": torch.tensor([0, 3, 6])},
            "no positions of its own",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 4, 6]), "cu_seqlens_q_padded": torch.tensor([0, 3, 6])},
            r"with cu_seqlens_q_padded \[0, 3, 6\]",
        ),
        ({"visual_inputs": None}, "without pixel_values"),
        (
            {"visual_inputs": _Visual(pixel_values=_pixels(1.0, patches=8), image_grid_thw=_grid((1, 2, 2)))},
            r"grids of \[4\]",
        ),
        (
            {"visual_inputs": _Visual(pixel_values=_pixels(1, 1, patches=8), image_grid_thw=_grid(*[TWO_BY_FOUR] * 2))},
            "placeholders",
        ),
    ],
)
def test_qwen_batches_that_cannot_be_read_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        QWEN.read(dict(_one(1.0), **change))


def _packed(lengths: list[int], multiple: int) -> dict:
    """Rows ROW and OTHER, the first cut to lengths, one after the other as Bridge's collator packs them."""
    pair, ends, padded = _pair(1.0, 3.0), [0], [0]
    columns: dict[str, list] = {"input_ids": [], "labels": [], "loss_mask": []}
    for row, length in enumerate(lengths):
        fill = -length % multiple
        for name, value in (("input_ids", 0), ("labels", IGNORE), ("loss_mask", 0.0)):
            columns[name] += pair[name][row, :length].tolist() + [value] * fill
        ends.append(ends[-1] + length)
        padded.append(padded[-1] + length + fill)
    batch = {name: torch.tensor([values]) for name, values in columns.items()}
    batch["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32)
    if multiple > 1:
        batch["cu_seqlens_q_padded"] = torch.tensor(padded, dtype=torch.int32)
    return dict(batch, attention_mask=None, visual_inputs=pair["visual_inputs"])


@pytest.mark.parametrize("multiple", [1, 4])
def test_samples_of_a_packed_row_are_what_they_are_in_rows_of_their_own(multiple):
    def rope_index(tokens, kinds, *_, **__):
        return torch.arange(tokens.shape[1]).expand(3, *tokens.shape), None

    adapter = QwenVLBatches(PICTURE_TOKEN, VIDEO_TOKEN, 2, rope_index)
    rows, packed = adapter.read(_pair(1.0, 3.0)), adapter.read(_packed([6, 6], multiple))
    fill = -6 % multiple
    assert packed.num_samples == 2 and packed.segment_length_N.tolist() == [6 + fill] * 2
    assert torch.equal(packed.reference_key_N2, rows.reference_key_N2)
    assert torch.equal(packed.difficulty_key_N2, rows.difficulty_key_N2)
    assert packed.media.sample_I.tolist() == [0, 1] and packed.media.count_I.tolist() == [2, 2]
    for sample in range(2):
        own, alone = packed.row_of("is_context_BS", sample), rows.is_context_BS[sample]
        assert own[:6].tolist() == alone.tolist() and not own[6:].any()
        assert packed.row_of("position_id_BS", sample)[:6].tolist() == rows.position_id_BS[sample].tolist()
        assert packed.row_of("is_target_BS", sample)[:6].tolist() == rows.is_target_BS[sample].tolist()


def test_a_text_batch_packed_by_bridge_has_a_sample_per_segment():
    batch = _packed([6, 5], 4)
    batch = {"tokens": batch.pop("input_ids"), **batch}
    facts = GPTBatches().read(batch)
    assert facts.segment_length_N.tolist() == [8, 8]
    real_BS = facts.is_context_BS | facts.is_target_BS
    assert real_BS[0].tolist() == [True] * 6 + [False] * 2 + [True] * 5 + [False] * 3


@pytest.mark.parametrize("pads", [True, False])
def test_what_fills_a_row_that_was_packed_offline_is_padding(pads):
    """Bridge writes a segment for it, and repeats where another row of the batch holds more samples."""
    tokens = torch.tensor([[5, 6, 7, 8, 9, 3, 3, 3]])
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.tensor([[0, 1, 0, 1, 0, 0, 0, 0]])}
    batch["cu_seqlens_q"] = torch.tensor([[0, 2, 5, 5, 5]] if pads else [[0, 2, 5, 8, 8]])
    if pads:
        batch["cu_seqlens_q_padded"] = torch.tensor([[0, 2, 5, 8, 8]])
    facts = GPTBatches().read(batch)
    assert facts.segment_length_N.tolist() == [2, 3, 3]
    assert (facts.is_context_BS | facts.is_target_BS)[0].tolist() == [True] * 5 + [False] * 3


def test_rows_that_the_step_pads_are_read_as_long_as_the_model_sees_them():
    adapter, batch = PaddedRows(adapter=QWEN, multiple=4), _pair(1.0, 3.0)
    facts, plain = adapter.read(batch), QWEN.read(batch)
    assert facts.dense_length == 8 and facts.num_targets == plain.num_targets
    assert not (facts.is_context_BS | facts.is_target_BS)[:, 6:].any()
    assert torch.equal(facts.difficulty_key_N2, plain.difficulty_key_N2)
    assert PaddedRows(adapter=QWEN, multiple=4, length=16).read(batch).dense_length == 16


def test_rows_that_the_step_lays_end_to_end_are_segments_planned_as_rows():
    adapter, batch = PaddedRows(adapter=QWEN, multiple=4, end_to_end=True), _pair(1.0, 3.0)
    facts = adapter.read(batch)
    assert facts.joins_rows and facts.planned_length == 8 and facts.segment_length_N.tolist() == [8, 8]
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [3, 4, 11, 12]
    is_elided_BS = torch.zeros(1, 16, dtype=torch.bool)
    is_elided_BS[0, [4, 11]] = True
    elided = adapter.elide(batch, is_elided_BS)
    assert elided["loss_mask"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_qwen_elide_edits_the_loss_mask_only():
    batch = _one(1.0)
    elided = QWEN.elide(batch, torch.tensor([[False, False, False, False, True, False]]))
    assert elided["loss_mask"].tolist() == [[0, 0, 0, 1, 0, 0]] and batch["loss_mask"].tolist() == [MASK]
    assert all(elided[name] is batch[name] for name in batch if name != "loss_mask")


def test_qwen_positions_are_the_model_s_own_with_their_axes_last():
    def rope_index(tokens, kinds, image_grid, video_grid, *, second_per_grid_ts, attention_mask):
        assert kinds.tolist() == [[0, 1, 1, 0, 0, 0]] and video_grid is second_per_grid_ts is attention_mask is None
        return torch.stack([torch.arange(6)[None] * axis for axis in image_grid[0].tolist()]), None

    adapter = QwenVLBatches(PICTURE_TOKEN, VIDEO_TOKEN, 2, rope_index)
    assert adapter.read(_one(1.0)).position_id_BS[0, 3].tolist() == [3, 6, 12]
