"""Batch adapters: they read what the model would do, and edit nothing but the loss mask of elided targets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regate_megatron.batches import GPTBatches, LLaVABatches, NamedSamples, StepFacts
from regate_megatron.batches.facts import key_hex
from regate_megatron.batches.media import Media, cells_of_image, image_grid, some_of_each

IMAGE = -200


# ------------------------------------------------------------------------------------------------------------- GPT


def _gpt(*rows: tuple[list[int], list[int]], pad: int = 0, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of rows (a text, the loss mask of its predictions), padded at the end as Megatron's datasets do."""
    length = length or max(len(text) - 1 for text, _ in rows)
    tokens, labels, masks = [], [], []
    for text, mask in rows:
        fill = length - len(text) + 1
        tokens.append(text[:-1] + [pad] * fill)
        labels.append(text[1:] + [pad] * fill)
        masks.append(mask + [0] * fill)
    return {
        "tokens": torch.tensor(tokens),
        "labels": torch.tensor(labels),
        "loss_mask": torch.tensor(masks, dtype=torch.float32),
    }


FIRST = ([5, 6, 7, 8, 9], [0, 0, 1, 1])
SECOND = ([5, 6, 7, 8, 4], [0, 0, 1, 1])  # another last label
THIRD = ([3, 1, 2], [0, 1])


def test_a_text_position_is_a_target_where_its_loss_mask_is_positive():
    facts = GPTBatches().read(_gpt(FIRST, THIRD, length=6))
    assert facts.is_target_BS.tolist() == [[False, False, True, True, False, False], [False, True] + [False] * 4]
    assert facts.is_context_BS.tolist() == [[True, True] + [False] * 4, [True] + [False] * 5]
    assert facts.label_BS[facts.is_target_BS].tolist() == [8, 9, 2]
    assert facts.token_BS[0, :4].tolist() == [5, 6, 7, 8]
    assert not facts.is_visual_BS.any()
    assert facts.dense_length == 6


def test_text_keys_tell_content_apart_and_are_the_same_for_both_kinds():
    facts = GPTBatches().read(_gpt(FIRST, SECOND, FIRST))
    assert torch.equal(facts.reference_key_N2, facts.difficulty_key_N2)
    assert facts.reference_key_N2.dtype == torch.int64 and facts.reference_key_N2.shape == (3, 2)
    first, second, again = map(key_hex, facts.reference_key_N2)
    assert first == again != second and len(first) == 32


def test_a_text_key_depends_on_which_positions_are_targets():
    other = (FIRST[0], [0, 1, 1, 1])
    keys = GPTBatches().read(_gpt(FIRST, other)).reference_key_N2
    assert not torch.equal(keys[0], keys[1])


@pytest.mark.parametrize("pad", [0, 9, 77])
def test_a_text_key_does_not_depend_on_how_long_or_with_what_the_row_is_padded(pad):
    alone = GPTBatches().read(_gpt(FIRST)).reference_key_N2[0]
    for length in (6, 7, 30):
        assert torch.equal(GPTBatches().read(_gpt(FIRST, pad=pad, length=length)).reference_key_N2[0], alone)


def test_a_text_key_does_not_change_for_a_single_padding_token():
    alone = GPTBatches().read(_gpt(FIRST)).reference_key_N2[0]
    assert torch.equal(GPTBatches().read(_gpt(FIRST, length=5)).reference_key_N2[0], alone)


def test_a_text_key_does_not_depend_on_the_batch_around_it():
    keys = GPTBatches().read(_gpt(FIRST, SECOND, THIRD, length=9)).reference_key_N2
    turned = GPTBatches().read(_gpt(THIRD, FIRST, SECOND, length=12)).reference_key_N2
    assert torch.equal(turned, keys[[2, 0, 1]])


def test_repeated_tokens_with_loss_at_the_end_of_a_row_are_no_padding():
    keys = GPTBatches().read(_gpt(*(([5, 7, 7, 7, last], [0, 1, 1, 1]) for last in (7, 8, 9)))).reference_key_N2
    assert len({key_hex(key) for key in keys}) == 3


def test_context_that_repeats_the_last_target_is_no_padding():
    facts = GPTBatches().read(_gpt(([7, 7, 7, 7], [0, 1, 1])))
    assert facts.is_context_BS.tolist() == [[True, False, False]]


def test_rows_without_targets_are_keyed_by_their_text():
    rows = [([5, 6, 7, last, 1], [0, 0, 0, 0]) for last in (2, 3)]
    keys = GPTBatches().read(_gpt(*rows, length=8)).reference_key_N2
    assert not torch.equal(keys[0], keys[1])


def test_labels_without_loss_are_not_content():
    batch = _gpt(FIRST)
    other = dict(batch, labels=batch["labels"].masked_fill(batch["loss_mask"] == 0, -100))
    assert torch.equal(GPTBatches().read(batch).reference_key_N2, GPTBatches().read(other).reference_key_N2)


def test_a_label_below_0_is_no_target_and_its_position_is_context():
    """The habit of Hugging Face: -100 where there is nothing to predict, under a loss mask of ones."""
    batch = _gpt(FIRST, THIRD, length=6)
    habit = dict(batch, labels=batch["labels"].masked_fill(batch["loss_mask"] == 0, -100))
    habit["loss_mask"] = torch.ones_like(batch["loss_mask"])
    plain, facts = GPTBatches().read(batch), GPTBatches().read(habit)
    assert torch.equal(facts.is_target_BS, plain.is_target_BS) and bool((facts.label_BS[facts.is_target_BS] >= 0).all())
    assert torch.equal(facts.is_context_BS, ~facts.is_target_BS), "what has a loss is no padding"
    assert torch.equal(facts.reference_key_N2, plain.reference_key_N2), "the keys are those of the usual labels"
    elided = GPTBatches().elide(habit, plain.is_target_BS)
    assert torch.equal(elided["loss_mask"] > 0, ~plain.is_target_BS), "the loss there counts as ever"


def test_packed_rows_with_labels_below_0_have_the_targets_that_have_labels():
    batch = _gpt(FIRST, SECOND)
    batch["labels"][:, 2] = -1
    batch["cu_seqlens"] = torch.tensor([[0, 3, 4, 4, 4], [0, 1, 4, 4, 4]])
    facts = GPTBatches().read(batch)
    assert facts.is_target_BS.tolist() == [[False, False, False, True, False, False, False, True]]
    assert facts.is_context_BS[0, [2, 6]].all() and facts.num_target_N.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_eliding_text_zeroes_the_mask_of_the_elided_targets_and_nothing_else(dtype):
    batch = _gpt(FIRST, SECOND)
    batch["loss_mask"] = batch["loss_mask"].to(dtype)
    before = {name: value.clone() for name, value in batch.items()}
    elided = torch.tensor([[False, False, True, False], [False] * 4])
    got = GPTBatches().elide(batch, elided)
    assert got["loss_mask"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert got["loss_mask"].dtype == dtype
    assert got["tokens"] is batch["tokens"] and got["labels"] is batch["labels"]
    assert all(torch.equal(batch[name], value) for name, value in before.items())


@pytest.mark.parametrize("missing", ["tokens", "labels", "loss_mask"])
def test_a_batch_of_another_layout_is_a_key_error(missing):
    batch = _gpt(FIRST)
    del batch[missing]
    for adapter in (GPTBatches(), LLaVABatches(3, IMAGE, 99, False)):
        with pytest.raises(KeyError):
            adapter.read(batch)


# ----------------------------------------------------------------------------------------------------------- LLaVA


@pytest.fixture(scope="module")
def llava_model():
    return pytest.importorskip(
        "megatron.core.models.multimodal.llava_model", reason="megatron-core is not installed"
    ).LLaVAModel


def _merge(llava_model, batch: dict, adapter: LLaVABatches):
    """What LLaVAModel itself makes of a batch: (embeddings [S, B], labels [B, S], loss mask [B, S]).

    The embedding of a text entry is 1000 + its token; of a visual position -1 - its number over the batch.
    """
    tokens = batch["tokens"]
    tiles = batch.get("num_image_tiles", torch.ones(int((tokens == adapter.image_token).sum()), dtype=torch.int32))
    count = int(tiles.sum())
    picture = -1.0 - torch.arange(count * adapter.image_length).view(count, adapter.image_length)
    model = SimpleNamespace(
        add_decoder=True,
        pre_process=True,
        post_process=True,
        img_seq_len=adapter.image_length,
        _language_is_pipeline_parallel=adapter.pads_to_max,
        _language_max_sequence_length=adapter.max_length,
        context_parallel_lm=1,
        vision_model=None,
        sound_model=None,
    )
    embeddings, labels, loss_mask = llava_model._preprocess_data(
        model,
        picture.t()[:, :, None] if count else torch.empty(0, 0, 1),
        1000.0 + tokens[:, :, None],
        tokens,
        batch["loss_mask"],
        batch["labels"],
        False,
        None,
        adapter.image_token,
        tiles,
    )
    return embeddings[:, :, 0].t(), labels, loss_mask


def _llava(
    *rows: tuple[list[int], list[int]],
    pad: int = 0,
    length: int | None = None,
    first: int = 0,
    tiles: list[int] | None = None,
) -> dict:
    """As :func:`_gpt`, with placeholders in the texts, and 2×2 images for these, numbered from ``first``: one for each,
    or as many as ``tiles``.
    """
    batch = _gpt(*rows, pad=pad, length=length)
    count = int((batch["tokens"] == IMAGE).sum())
    if tiles is not None:
        batch["num_image_tiles"] = torch.tensor(tiles[:count], dtype=torch.int32)
        count = int(batch["num_image_tiles"].sum())
    if count:
        numbers = torch.arange(first, first + count, dtype=torch.float32)
        batch["image"] = numbers[:, None, None, None].expand(count, 3, 2, 2).contiguous()
    return batch


def _check_against_the_model(llava_model, batch: dict, adapter: LLaVABatches, elided_share=None) -> None:
    facts = adapter.read(batch)
    embeddings, labels, loss_mask = _merge(llava_model, batch, adapter)
    assert torch.equal(facts.is_target_BS, (loss_mask > 0) & (labels >= 0))
    assert bool(facts.is_context_BS[(loss_mask > 0) & (labels < 0)].all())  # a loss without a label: it runs
    assert torch.equal(facts.label_BS[facts.is_target_BS], labels[facts.is_target_BS])
    assert torch.equal(facts.is_visual_BS, embeddings < 0)
    step, number_V = StepFacts([facts]), -1 - embeddings[embeddings < 0]
    assert torch.equal(step.medium_V, number_V.long() // adapter.image_length)
    lead_V = 0 if facts.media.lead_I is None else facts.media.lead_I[step.medium_V]
    assert torch.equal(step.place_V + lead_V, number_V.long() % adapter.image_length)
    assert torch.equal(step.sample_I[step.medium_V], torch.where(embeddings < 0)[0])
    is_text = embeddings > 0
    assert torch.equal(facts.token_BS[is_text], embeddings[is_text].long() - 1000)
    # Every position is a target, context or padding; nothing the model leaves empty is context.
    assert not (facts.is_target_BS & facts.is_context_BS).any()
    assert not (facts.is_context_BS & (embeddings == 0)).any()
    assert (facts.is_context_BS | ~facts.is_visual_BS).all()
    last_target = torch.where(facts.is_target_BS, torch.arange(facts.dense_length), -1).amax(dim=1, keepdim=True)
    read_before = torch.arange(facts.dense_length) <= last_target
    assert (facts.is_target_BS | facts.is_context_BS | ~read_before).all()
    # Eliding any targets gives the model exactly its own mask without these.
    generator = torch.Generator().manual_seed(int(loss_mask.sum()))
    for share in (0.5, 1.0):
        is_elided = facts.is_target_BS & (torch.rand(facts.is_target_BS.shape, generator=generator) < share)
        before = batch["loss_mask"].clone()
        edited = adapter.elide(batch, is_elided)
        assert torch.equal(batch["loss_mask"], before)
        assert all(edited[name] is batch[name] for name in batch if name != "loss_mask")
        assert torch.equal(_merge(llava_model, edited, adapter)[2], loss_mask.masked_fill(is_elided, 0))
        assert int((edited["loss_mask"] != before).sum()) == int(is_elided.sum())


V = IMAGE
LAYOUTS = {
    "an image first": [([V, 5, 6, 7, 8], [0, 0, 1, 1])],
    "an image in the middle": [([5, 6, V, 7, 8, 9], [1, 1, 1, 1, 1])],
    "an image last": [([5, 6, 7, V, 8], [1, 1, 1, 1])],
    "two images apart": [([5, V, 6, 7, V, 8, 9], [1, 1, 1, 1, 1, 1])],
    "two images side by side": [([5, V, V, 6, 7], [1, 1, 1, 1])],
    "no image": [([5, 6, 7, 8], [0, 1, 1]), ([1, 2, 3, 4], [1, 1, 1])],
    "rows of different numbers of images": [
        ([V, 5, 6, 7, 8], [0, 0, 1, 1]),
        ([5, 6, V, 7, V], [0, 1, 1, 1]),
        ([1, 2, 3, 4, 5], [0, 1, 1, 1]),
    ],
    "no targets": [([V, 5, 6, 7], [0, 0, 0])],
    "padded rows": [([V, 5, 6, 7, 8, 9, 3, 4], [0, 0, 1, 1, 1, 1, 1]), ([V, 5, 6, 7], [0, 0, 1])],
}


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("max_length", "pads"), [(64, False), (64, True), (6, False), (6, True)], ids=["whole", "padded", "cut", "cut-pp"]
)
def test_what_is_read_and_elided_is_what_the_model_merges(llava_model, rows, max_length, pads):
    adapter = LLaVABatches(3, IMAGE, max_length, pads)
    _check_against_the_model(llava_model, _llava(*rows), adapter)


@st.composite
def llava_cases(draw):
    width = draw(st.integers(2, 8))
    text = st.lists(st.one_of(st.just(IMAGE), st.integers(1, 5), st.integers(1, 5)), min_size=width, max_size=width)
    mask = st.lists(st.integers(0, 1), min_size=width - 1, max_size=width - 1)
    rows = draw(st.lists(st.tuples(text, mask), min_size=1, max_size=3))
    adapter = LLaVABatches(draw(st.integers(1, 4)), IMAGE, draw(st.integers(1, 24)), draw(st.booleans()))
    tiles = draw(st.none() | st.lists(st.integers(1, 3), min_size=3 * width, max_size=3 * width))
    return _llava(*rows, length=width - 1 + draw(st.integers(0, 3)), tiles=tiles), adapter


@given(case=llava_cases())
def test_any_layout_is_read_and_elided_as_the_model_merges_it(llava_model, case):
    _check_against_the_model(llava_model, *case)


def test_the_merged_positions_of_one_row_by_hand():
    facts = LLaVABatches(3, IMAGE, 64, False).read(_llava(([5, 6, V, 7, 8, 9], [1, 1, 1, 1, 1])))
    assert facts.token_BS.tolist() == [[5, 6, 0, 0, 0, 7, 8]]
    assert facts.is_visual_BS.tolist() == [[False, False, True, True, True, False, False]]
    # Position 1 would predict the image: the model trains no token to do that.
    assert facts.is_target_BS.tolist() == [[True, False, False, False, False, True, True]]
    assert facts.label_BS[facts.is_target_BS].tolist() == [6, 8, 9]
    assert facts.is_context_BS.tolist() == [[False, True, True, True, True, False, False]]


def test_cells_of_a_picture_are_the_pixels_under_its_visual_positions():
    batch = _llava(([V, 5, V, 6], [0, 1, 1]))
    batch["image"] = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    media = LLaVABatches(6, IMAGE, 64, False).read(batch).media
    assert media.lead_I.tolist() == [0, 0] and media.grid_I3.tolist() == [[1, 2, 3]] * 2
    second = media.pixels(1)
    assert second.shape == (6, 12) and second[0, :4].tolist() == [72, 73, 78, 79]  # first channel of the first cell
    assert second[5, :4].tolist() == [88, 89, 94, 95] and second[0, 4] == 96
    with_class_token = LLaVABatches(7, IMAGE, 64, False).read(batch)
    assert with_class_token.media.lead_I.tolist() == [1, 1]
    assert with_class_token.media.grid_I3.tolist() == [[1, 2, 3]] * 2
    assert StepFacts([with_class_token]).place_V.tolist() == [*range(-1, 6)] * 2


@pytest.mark.parametrize(
    ("positions", "height", "width", "found"),
    [
        (576, 336, 336, (0, 24, 24)),
        (577, 336, 336, (1, 24, 24)),  # CLIP with its class token
        (256, 448, 448, (0, 16, 16)),  # pixel shuffle: cells of 28
        (264, 256, 256, (8, 16, 16)),  # RADIO
        (32, 16, 32, (0, 4, 8)),
        (3, 2, 2, None),
        (1, 14, 28, None),
    ],
)
def test_the_grid_of_a_picture_follows_from_its_size_and_positions(positions, height, width, found):
    assert image_grid(positions, height, width) == found


def test_large_cells_are_looked_at_here_and_there():
    cells = cells_of_image(torch.randn(3, 56, 28), 2, 1)
    assert cells.shape == (2, 3 * 4 * 4)


def test_pictures_whose_cells_cannot_be_told_have_no_grid():
    media = LLaVABatches(3, IMAGE, 64, False).read(_llava(PICTURE)).media
    assert media.grid_I3 is None and media.pixels is None and media.count_I.tolist() == [3]


def test_under_pipeline_parallelism_every_row_has_the_full_length_and_its_end_is_padding():
    facts = LLaVABatches(3, IMAGE, 10, True).read(_llava(LAYOUTS["an image first"][0]))
    assert facts.dense_length == 10
    assert not (facts.is_target_BS | facts.is_context_BS)[:, 6:].any()


PICTURE = ([V, 5, 6, 7, 8], [0, 0, 1, 1])
CAPTION = ([V, 5, 6, 7, 4], [0, 0, 1, 1])
TEXT = ([3, 5, 6, 7, 8], [0, 0, 1, 1])


def _keys(batch: dict, image_length: int = 3, max_length: int = 64, pads: bool = False):
    facts = LLaVABatches(image_length, IMAGE, max_length, pads).read(batch)
    return facts.reference_key_N2, facts.difficulty_key_N2


def test_another_picture_changes_the_difficulty_key_and_not_the_reference_key():
    reference, difficulty = _keys(_llava(PICTURE, first=0))
    other_reference, other_difficulty = _keys(_llava(PICTURE, first=1))
    assert torch.equal(reference, other_reference)
    assert not (difficulty == other_difficulty).any()


def test_one_pixel_is_enough_to_change_the_difficulty_key():
    batch = _llava(PICTURE)
    other = dict(batch, image=batch["image"].clone())
    other["image"][0, 2, 1, 1] += 1e-3
    assert not torch.equal(_keys(batch)[1], _keys(other)[1])


def test_another_text_or_another_layout_changes_both_keys():
    for other in (_keys(_llava(CAPTION)), _keys(_llava(PICTURE), image_length=4)):
        for mine, others in zip(_keys(_llava(PICTURE)), other, strict=True):
            assert not torch.equal(mine, others)


@pytest.mark.parametrize("max_length", [64, 32])
def test_keys_do_not_depend_on_padding_or_on_how_the_model_pads(max_length):
    expected = _keys(_llava(PICTURE))
    for length in (6, 9):
        for pads in (False, True):
            got = _keys(_llava(PICTURE, length=length, pad=1), max_length=max_length, pads=pads)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_each_row_is_keyed_with_its_own_pictures_wherever_it_stands():
    two = ([5, V, 6, V, 7], [1, 1, 1, 1])
    batch = _llava(PICTURE, two, TEXT, CAPTION, first=10)
    images = batch["image"]
    assert len(images) == 4
    for keys, turned in zip(
        _keys(batch), _keys(dict(_llava(CAPTION, TEXT, PICTURE, two), image=images[[3, 0, 1, 2]])), strict=True
    ):
        assert torch.equal(turned, keys[[3, 2, 0, 1]])
    swapped = _keys(dict(batch, image=images[[0, 2, 1, 3]]))[1]
    assert (swapped == _keys(batch)[1]).all(dim=1).tolist() == [True, False, True, True]


def test_the_same_bytes_under_another_entry_name_are_the_same_pictures():
    batch = _llava(PICTURE, first=3)
    renamed = {"images" if name == "image" else name: value for name, value in batch.items()}
    assert torch.equal(_keys(batch)[1], _keys(renamed)[1])


def test_bfloat16_pictures_are_keyed_too():
    batch = _llava(PICTURE, first=3)
    batch["image"] = batch["image"].bfloat16()
    assert _keys(batch)[1].shape == (1, 2)


def test_a_text_only_row_has_one_key_beside_pictures_and_alone():
    assert torch.equal(_keys(_llava(PICTURE, TEXT))[1][1], _keys(_llava(TEXT))[1][0])


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_the_model_cuts_off_is_gone_where_it_pads_the_rest(multiple):
    """A row of 11 positions cut to 10: where ranks cut it evenly it is padded to 12, with nothing."""
    row = _llava(([5, V, *range(6, 15)], [0, *[1] * 9]))
    facts = LLaVABatches(2, IMAGE, 10, False, multiple=multiple).read(row)
    assert facts.dense_length == (12 if multiple > 1 else 10)
    assert torch.where(facts.is_target_BS[0])[0].tolist() == list(range(3, 10))
    assert torch.where(facts.is_context_BS[0])[0].tolist() == [0, 1, 2]
    assert int(facts.media.count_I.sum()) == 2


TILED = [([V, 5, V, 6], [0, 1, 1])]


def _clips(frames: list[int], length: int = 64) -> Media:
    """Of two images of three tiles, the second cut off after ``length`` positions."""
    batch = _llava(*TILED, tiles=[3, 3]) | {"num_frames": torch.tensor(frames)}
    batch["image"] = torch.arange(6 * 3 * 4 * 6, dtype=torch.float32).view(6, 3, 4, 6)
    return LLaVABatches(6, IMAGE, length, False).read(batch).media


def test_tiles_are_pictures_of_their_own_and_frames_are_a_clip():
    media = _clips([1, 3])
    assert media.grid_I3.tolist() == [[1, 2, 3]] * 3 + [[3, 2, 3]]
    assert media.count_I.tolist() == [6, 6, 6, 18] and media.sample_I.tolist() == [0] * 4
    frames = np.concatenate([_clips([1, 1]).pixels(tile) for tile in (3, 4, 5)])
    assert np.array_equal(media.pixels(3), frames)
    assert _clips([1, 3], length=25).count_I.tolist() == [6, 6, 6, 6]  # 18 of tiles, one of text
    assert _clips([3, 1], length=25).count_I.tolist() == [18, 6, 0, 0]


def test_clips_that_a_collator_stacked_are_those_of_a_flat_batch():
    stacked = _llava(*TILED, tiles=[3, 3]) | {"num_frames": torch.tensor([3, 3])}
    flat = torch.arange(6 * 3 * 4 * 6, dtype=torch.float32).view(6, 3, 4, 6)
    media, same = (
        LLaVABatches(6, IMAGE, 64, False).read(stacked | {"image": image}).media
        for image in (flat.view(2, 3, 3, 4, 6), flat)
    )
    assert torch.equal(media.grid_I3, same.grid_I3) and np.array_equal(media.pixels(1), same.pixels(1))


def test_frames_that_each_begin_with_a_class_token_are_pictures_of_their_own():
    batch = _llava(*TILED, tiles=[3, 3]) | {"num_frames": torch.tensor([3, 3])}
    batch["image"] = torch.zeros(6, 3, 4, 6)
    media = LLaVABatches(7, IMAGE, 64, False).read(batch).media
    assert media.lead_I.tolist() == [1] * 6 and media.grid_I3.tolist() == [[1, 2, 3]] * 6


def test_another_number_of_tiles_is_another_sample():
    one, two = (_keys(_llava(PICTURE, tiles=[count])) for count in (1, 2))
    assert not torch.equal(one[0], two[0]) and torch.equal(one[0], _keys(_llava(PICTURE))[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_image_tiles": torch.tensor([2])}, r"1 images for tiles \[2\]"),
        ({"num_tiles": torch.tensor([1, 1])}, r"tiles \[1, 1\] for 1 placeholders"),
        ({"num_image_tiles": torch.tensor([0])}, r"tiles \[0\] for 1 placeholders"),
        ({"num_frames": torch.tensor([2])}, r"num_frames \[2\] for tiles \[1\]"),
        ({"imgs_sizes": torch.tensor([[2, 2]])}, "imgs_sizes"),
    ],
)
def test_tiles_that_do_not_fit_the_images_are_refused_not_misread(given, message):
    with pytest.raises(ValueError, match=message):
        _keys(_llava(PICTURE) | given)


def _packed(*rows: list[tuple[list[int], list[int]]], length: int) -> dict:
    """Rows of segments (tokens, mask), filled up inside the last segment as Megatron's SFT dataset does."""
    batch: dict = {"tokens": [], "labels": [], "loss_mask": [], "position_ids": [], "cu_seqlens": []}
    for segments in rows:
        tokens = [token for segment, _ in segments for token in segment]
        mask = [value for _, values in segments for value in values]
        fill = length - len(tokens)
        lengths = [len(segment) for segment, _ in segments]
        lengths[-1] += fill
        cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        tokens += [0] * fill
        batch["tokens"].append(tokens)
        batch["labels"].append([*tokens[1:], 0])
        batch["loss_mask"].append(mask + [0] * fill)
        batch["position_ids"].append([place for size in lengths for place in range(size)])
        batch["cu_seqlens"].append(cu + [length] * (length + 1 - len(cu)))
    return {name: torch.tensor(value) for name, value in batch.items()}


ONE, TWO, THREE = ([5, 6, 7, 8], [0, 1, 1, 0]), ([9, 5, 3], [0, 1, 0]), ([4, 4, 2, 6, 1], [0, 0, 1, 1, 0])


def test_packed_rows_are_laid_one_after_the_other():
    facts = GPTBatches().read(_packed([ONE, TWO], [THREE], length=9))
    assert facts.is_target_BS.shape == (1, 18) and facts.num_samples == 3
    assert facts.sample_BS[0].tolist() == [0] * 4 + [1] * 5 + [2] * 9
    assert facts.num_target_N.tolist() == [2, 1, 2] and facts.row_N.tolist() == [0, 0, 0]
    assert facts.start_N.tolist() == [0, 4, 9] and facts.segment_length_N.tolist() == [4, 5, 9]
    assert StepFacts([facts]).place_X.tolist() == [1, 2, 1, 2, 3]
    assert facts.row_of("token_BS", 1).tolist() == [9, 5, 3, 0, 0]
    assert facts.is_context_BS[0].tolist()[:9] == [True, False, False, True, True, False, True, False, False]


def test_a_sample_has_one_key_wherever_it_is_packed():
    keys = GPTBatches().read(_packed([ONE, TWO], [THREE], length=9)).reference_key_N2
    turned = GPTBatches().read(_packed([THREE, TWO], [ONE], length=12)).reference_key_N2
    assert torch.equal(keys, turned[[2, 1, 0]])
    tokens, mask = ONE
    alone = GPTBatches().read(_gpt(([*tokens, 0], mask), length=6)).reference_key_N2
    assert torch.equal(alone[0], keys[0])


def test_elision_of_a_packed_row_edits_the_rows_it_came_from():
    batch = _packed([ONE, TWO], [THREE], length=9)
    elided = torch.zeros(1, 18, dtype=torch.bool)
    elided[0, [1, 11]] = True
    mask = GPTBatches().elide(batch, elided)["loss_mask"]
    assert mask.shape == (2, 9) and mask[0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert mask[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_segments_that_do_not_cover_the_row_are_refused():
    batch = _packed([ONE, TWO], length=9)
    batch["cu_seqlens"][0, 1:] = 5
    with pytest.raises(ValueError, match="from 0 to 9"):
        GPTBatches().read(batch)


# ----------------------------------------------------------------------------------------------- position ids in keys


def _key(batch: dict, *, reads: bool) -> str:
    return key_hex(GPTBatches(reads).read(batch).reference_key_N2[0])


@pytest.mark.parametrize("reads", [True, False])
def test_position_ids_are_in_the_key_of_a_model_that_reads_them(reads):
    batch = _gpt(FIRST)
    others = [torch.tensor([[0, 1, 5, 6]]), torch.tensor([[2, 3, 4, 5]]), torch.tensor([[0, 1, 2, 4]])]
    keys = {_key(dict(batch, position_ids=ids), reads=reads) for ids in others}
    assert len(keys | {_key(batch, reads=reads)}) == (4 if reads else 1)


@pytest.mark.parametrize("reads", [True, False])
def test_positions_from_the_samples_own_start_leave_its_key_alone(reads):
    """Padded, packed or alone; with ids from the start or without; and ids after the last target are nobody's."""
    keys = {_key(_gpt(FIRST), reads=reads), _key(_gpt(FIRST, length=9), reads=reads)}
    keys.add(_key(dict(_gpt(FIRST), position_ids=torch.arange(4)[None]), reads=reads))
    keys.add(_key(dict(_gpt(FIRST, length=6), position_ids=torch.tensor([[0, 1, 2, 3, 0, 0]])), reads=reads))
    assert len(keys) == 1
    one, two = ([*ONE[0], 0], ONE[1]), ([*TWO[0], 0], TWO[1])
    packed = GPTBatches(reads).read(_packed([ONE, TWO], length=9)).reference_key_N2
    assert [key_hex(key) for key in packed] == [_key(_gpt(row), reads=reads) for row in (one, two)]


def test_packed_sample_whose_ids_go_on_from_the_one_before_is_another_to_a_model_that_reads_them():
    usual = _packed([ONE, TWO], length=9)
    going_on = dict(usual, position_ids=torch.arange(9)[None])
    first, second = ([key_hex(key) for key in GPTBatches(True).read(one).reference_key_N2] for one in (usual, going_on))
    assert first[0] == second[0] and first[1] != second[1]


def test_mrope_ids_are_in_the_key_up_to_where_they_start():
    """They are relative: an offset of one axis changes no loss, a distance does."""
    axes = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 1, 3]])[:, None]  # [3, B, S]
    keys = [_key(dict(_gpt(FIRST), position_ids=ids), reads=False) for ids in (axes, axes + 5, axes * 2)]
    keys.append(_key(dict(_gpt(FIRST), position_ids=torch.arange(4).expand(3, 1, 4) + 9), reads=False))
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert keys[3] == _key(_gpt(FIRST), reads=False), "text alone has the key it has with one axis"


def test_llava_key_has_the_ids_of_text_where_the_model_reads_them():
    row = ([IMAGE, 5, 6, 7, 8], [0, 0, 1, 1])
    usual = dict(_gpt(row), image=torch.zeros(1, 3, 2, 2))
    moved = dict(usual, position_ids=torch.tensor([[0, 4, 5, 6]]))
    for reads in (True, False):
        adapter = LLaVABatches(3, IMAGE, 99, False, reads_position_ids=reads)
        first, second = (key_hex(adapter.read(one).reference_key_N2[0]) for one in (usual, moved))
        assert (first != second) == reads


# ------------------------------------------------------------------------------------------- what is one sample


def _augmented(brightness: float, **more) -> dict:
    return dict(_gpt(([IMAGE, 5, 6, 7, 8], [0, 0, 1, 1])), image=torch.full((1, 3, 2, 2), brightness), **more)


def _named_keys(batch: dict, how: str) -> tuple[str, str]:
    merged = LLaVABatches(3, IMAGE, 99, False)
    facts = (NamedSamples(merged, how) if how != "content" else merged).read(batch)
    return key_hex(facts.difficulty_key_N2[0]), key_hex(facts.reference_key_N2[0])


@pytest.mark.parametrize(("how", "is_one"), [("content", False), ("text", True), ("sample_id", True)])
def test_an_augmented_picture_is_the_same_sample_by_its_text_or_an_id(how, is_one):
    dark, bright = (_named_keys(_augmented(light, sample_id=torch.tensor([7])), how) for light in (0.1, 0.9))
    assert (dark[0] == bright[0]) == is_one and dark[1] == bright[1]
    assert _named_keys(_augmented(0.1, sample_id=torch.tensor([7])), "content")[1] == dark[1], (
        "what the teacher reads stays"
    )


def test_ids_tell_samples_of_one_text_apart_and_may_be_numbers_or_words():
    keys = {_named_keys(_augmented(0.1, __key__=[name]), "__key__")[0] for name in ("a/1", "a/2", 7, b"7", "7")}
    assert len(keys) == 5
    number = _named_keys(_augmented(0.1, __key__=torch.tensor([7])), "__key__")[0]
    assert number in keys, "a number in a tensor is the number"


def test_ids_of_another_answer_are_other_samples():
    """Difficulty is kept by target: another answer has none to take over."""
    one, other = _gpt(FIRST), _gpt(SECOND)
    adapter = NamedSamples(GPTBatches(), "sample_id")
    keys = [adapter.read(dict(batch, sample_id=[3])).difficulty_key_N2 for batch in (one, other)]
    assert not torch.equal(*keys)


def test_text_key_is_the_same_padded_and_packed():
    adapter = NamedSamples(GPTBatches(), "text")
    tokens, mask = ONE
    alone = adapter.read(_gpt(([*tokens, 0], mask), length=7)).difficulty_key_N2[0]
    assert torch.equal(alone, adapter.read(_packed([TWO, ONE], length=9)).difficulty_key_N2[1])


@pytest.mark.parametrize(("more", "words"), [({}, "without the key 'sample_id'"), ({"sample_id": [1, 2]}, "2 ids")])
def test_batches_without_one_id_per_sample_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        _named_keys(_augmented(0.1, **more), "sample_id")


@pytest.mark.parametrize(("width", "dtype"), [(4704, torch.float32), (588, torch.bfloat16), (49 * 3, torch.float16)])
def test_a_few_values_of_each_place_are_of_all_rows_and_columns_and_channels_of_its_patch(width, dtype):
    place_N1, value_D = torch.arange(3)[:, None], torch.arange(width)
    one, two = (
        some_of_each((place_N1 * 10 + value_D % 7).to(dtype)),
        some_of_each((8 * value_D // width).to(dtype)[None]),
    )
    assert one.dtype == np.float32 and 56 <= one.shape[1] <= 64
    assert set(one[2]) == set(range(20, 27)), "every column of a patch of 7"
    assert set(two[0]) == set(range(8)), "and every eighth of it"


def test_what_a_place_has_little_of_is_looked_at_whole():
    value_ND = torch.arange(2 * 20.0).view(2, 20)
    assert some_of_each(value_ND).tolist() == value_ND.tolist()
