"""LLaVA batches of dynamic resolution: every picture has its own number of positions, frames may become one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import LLaVABatches, MultimodalBatches, adapter_for
from regate_megatron.batches.dynamic_pictures import Resolution
from regate_megatron.errors import ReGateError
from tests.unit.test_visual import _plan

V, SIDE = -200, 2
D = 3 * SIDE**2


def _batch(*rows: list[int], sizes: list[tuple[int, int]], frames: list[int] | None = None) -> dict:
    """Rows with a loss everywhere, and patches of which each is the number of its place in the batch."""
    tokens = torch.tensor(rows)
    labels = torch.cat([tokens[:, 1:], torch.full((len(rows), 1), 9)], dim=1)
    count = sum(height * width for height, width in sizes)
    patches = torch.arange(float(count))[:, None].expand(count, D).contiguous()
    batch = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape), "imgs": patches[None]}
    batch["imgs_sizes"] = SIDE * torch.tensor(sizes).view(-1, 2)
    return batch if frames is None else batch | {"num_frames": frames}


def _adapter(resolution: Resolution | None = None, length: int = 99) -> LLaVABatches:
    return LLaVABatches(1000, V, length, False, resolution=resolution or Resolution())


def _visual(facts) -> list[list[int]]:
    return [torch.where(row)[0].tolist() for row in facts.is_visual_BS]


TWO = _batch([5, V, 6, V, 7], [3, 4, 5, 6, 7], sizes=[(1, 2), (2, 3)])


def test_every_picture_has_the_positions_of_its_own_patches():
    facts = _adapter().read(TWO)
    assert _visual(facts) == [[1, 2, 4, 5, 6, 7, 8, 9], []]
    assert facts.media.sample_I.tolist() == [0, 0] and facts.media.count_I.tolist() == [2, 6]
    assert facts.media.grid_I3.tolist() == [[1, 1, 2], [1, 2, 3]]
    assert facts.media.pixels(1)[:, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.where(facts.is_target_BS[0])[0].tolist() == [10]  # what predicts a picture is none


@pytest.mark.parametrize("score", ["random", "even", "static", "detail"])
def test_every_picture_keeps_its_share(score):
    kept = _plan(_adapter().read(TWO), visual_keep_ratio=0.5, visual_score=score)
    assert (kept[0][1:3].count("x"), kept[0][4:10].count("x")) == (1, 3)
    assert kept[0][0] + kept[0][3] + kept[0][10] == "xxx" and kept[1][:5] == "xxxxx"


@pytest.mark.parametrize(
    ("how", "size", "grid", "first"),
    [
        (Resolution(4), (2, 4), [1, 2, 1], [0, 1, 2, 3]),
        (Resolution(4), (2, 2), [1, 1, 1], [0, 1, 2, 3]),
        (Resolution(4), (4, 6), [1, 1, 6], [0, 1, 2, 3]),  # the second four reach over the end of the first line
        (Resolution(4, in_squares=True), (2, 4), [1, 1, 2], [0, 1, 4, 5]),
    ],
)
def test_pixel_shuffle_makes_one_position_of_four_patches(how, size, grid, first):
    media = _adapter(how).read(_batch([V, 5], sizes=[size])).media
    assert media.count_I.tolist() == [size[0] * size[1] // 4] and media.grid_I3.tolist() == [grid]
    assert sorted(set(media.pixels(0)[0].tolist())) == first


def test_a_row_is_cut_in_its_last_picture():
    facts = _adapter(length=7).read(TWO)
    assert facts.dense_length == 7 and facts.media.count_I.tolist() == [2, 3]
    assert _visual(facts) == [[1, 2, 4, 5, 6], []] and not facts.is_target_BS[0].any()


def test_frames_of_a_clip_are_one_medium_and_text_may_stand_between_them():
    facts = _adapter().read(_batch([V, 5, V, 6, V, 7], sizes=[(1, 2), (1, 2), (1, 3)], frames=[2, 1]))
    assert facts.media.count_I.tolist() == [4, 3] and facts.media.grid_I3.tolist() == [[2, 1, 2], [1, 1, 3]]
    assert facts.media.pixels(0)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [([[V, V, 5]], [(1, 2), (2, 2)]), ([[V, 5], [V, 6]], [(1, 2), (1, 2)])],
    ids=["two sizes", "two rows"],
)
def test_frames_that_cannot_be_one_clip_are_pictures(rows, sizes):
    media = _adapter().read(_batch(*rows, sizes=sizes, frames=[2])).media
    assert media.grid_I3[:, 0].tolist() == [1, 1]


PAIRS = Resolution(frames=2, length=4)


def test_frames_that_become_one_are_one_placeholder_and_the_last_of_an_odd_clip_is_alone():
    facts = _adapter(PAIRS).read(_batch([V, V, 5, V, 6], sizes=[(2, 2)] * 4, frames=[3, 1]))
    assert _visual(facts) == [[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]]
    assert facts.media.count_I.tolist() == [8, 4] and facts.media.grid_I3.tolist() == [[2, 2, 2], [1, 2, 2]]
    under = facts.media.pixels(0)
    assert set(under[0].tolist()) == {0, 4} and set(under[4].tolist()) == {8}


def test_a_batch_of_text_may_bring_dummies_or_nothing():
    text = _batch([5, 6, 7], sizes=[])
    for given in ({}, {"imgs_sizes": torch.zeros(1, 2)}, {"imgs": torch.zeros(1, 1)}):
        assert not _adapter().read(text | given).is_visual_BS.any()


def test_a_sample_has_one_key_whatever_lies_before_it():
    alone = _adapter().read(_batch([V, 5, 6], sizes=[(1, 3)]))
    after = _batch([V, 3, 6], [V, 5, 6], sizes=[(2, 2), (1, 3)])
    after["imgs"][0, 4:] = torch.arange(3.0)[:, None]
    both = _adapter().read(after)
    assert torch.equal(both.difficulty_key_N2[1:], alone.difficulty_key_N2)
    other = _adapter().read(_batch([V, 5, 6], sizes=[(3, 1)]))
    assert not torch.equal(other.reference_key_N2, alone.reference_key_N2)


@pytest.mark.parametrize(
    ("how", "change", "words"),
    [
        (None, {"imgs_sizes": None}, "without images and imgs_sizes"),
        (None, {"imgs": torch.zeros(8, 3, 2, 2)}, "not one row of patches"),
        (None, {"imgs_sizes": torch.tensor([[2, 4], [2, 4]])}, r"8 patches for imgs_sizes of \[2, 2\]"),
        (None, {"imgs_sizes": torch.tensor([[2, 16]])}, "1 pictures in imgs_sizes for 2 placeholders"),
        (None, {"num_frames": [3]}, r"num_frames \[3\] for 2 imgs_sizes"),
        (Resolution(4), {}, r"imgs_sizes of \[2, 6\] patches, of which pixel shuffle merges 4"),
        (Resolution(4, in_squares=True), {}, "of which pixel shuffle merges 4"),
        (PAIRS, {}, "without num_frames"),
        (PAIRS, {"num_frames": [2]}, "1 pictures of 2 frames in imgs_sizes for 2 placeholders"),
        (PAIRS, {"num_frames": [1, 1]}, r"imgs_sizes of \[2, 6\] positions, where the model counts 4"),
    ],
)
def test_what_does_not_fit_together_is_said(how, change, words):
    with pytest.raises(ValueError, match=words):
        _adapter(how).read(TWO | change)


def test_rows_that_megatron_s_head_would_give_the_pictures_of_others_are_said():
    alone = Resolution(in_squares=True, most_rows=1)
    with pytest.raises(ValueError, match="imgs_sizes for 2 rows, where this Megatron-Core counts all pictures in each"):
        _adapter(alone).read(TWO)
    assert _adapter(alone).read(_batch([V, 5], sizes=[(1, 2)])).dense_length == 3
    assert _adapter(alone).read(_batch([5, 6], [7, 8], sizes=[])).dense_length == 2


def test_sizes_for_a_model_of_one_size_are_said():
    with pytest.raises(ValueError, match="imgs_sizes for a LLaVAModel that was not built with dynamic_resolution"):
        LLaVABatches(2, V, 99, False).read(TWO)


def _llava(**own):
    kind = type("LLaVAModel", (), {"__module__": "megatron.core.models.multimodal.llava_model"})
    model, own = kind(), {"stages": 1, "context": 1, **own}
    model.img_seq_len, model.image_token_index, model._language_max_sequence_length = 4, V, 12
    model._language_is_pipeline_parallel, model.tensor_model_parallel_size_lm = own["stages"] > 1, 1
    model.sequence_parallel_lm, model.tp_comm_overlap_lm, model.context_parallel_lm = False, False, own["context"]
    sizes = {"context_parallel_size": own.pop("context"), "pipeline_model_parallel_size": own.pop("stages")}
    model.config, model.language_model = SimpleNamespace(**sizes), SimpleNamespace(position_embedding_type="rope")
    settings = {"dynamic_resolution": True, "temporal_patch_dim": 1, "_pixel_shuffle": False}
    for name, value in (settings | {"_drop_vision_class_token": True} | own).items():
        setattr(model, name, value)
    return model


def test_a_model_says_what_it_makes_of_patches():
    def resolution(**own):
        adapter = adapter_for(_llava(**own), None)
        assert isinstance(adapter, MultimodalBatches)
        return adapter.merged.resolution

    assert resolution() == Resolution() and resolution(_pixel_shuffle=True) == Resolution(4)
    assert resolution(temporal_patch_dim=2, stages=2) == Resolution(1, in_squares=True, frames=2, length=4)
    head = {"dynamic_resolution": False, "_dynamic_resolution": True, "_conv_merging": False, "_max_num_tiles": 0}
    assert resolution(**head) == Resolution(1, in_squares=True, most_rows=1)
    assert resolution(dynamic_resolution=False) is None


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"stages": 2}, "on 2 pipeline stages; allowed one: Megatron's last stage has no tower to count"),
        ({"_drop_vision_class_token": False}, "keeps class tokens"),
        ({"temporal_patch_dim": 2, "_drop_vision_class_token": False}, "keeps class tokens"),
        ({"temporal_patch_dim": 2, "context": 2}, "temporal_patch_dim 2 on 2 context ranks"),
        ({"_dynamic_resolution": True, "_conv_merging": True, "_max_num_tiles": 0}, "with tiles or conv_merging"),
        ({"_dynamic_resolution": True, "_conv_merging": False, "_max_num_tiles": 12}, "with tiles or conv_merging"),
    ],
)
def test_a_model_that_cannot_run_it_is_refused_with_the_reason(own, words):
    with pytest.raises(ReGateError, match=words) as refusal:
        adapter_for(_llava(**own), None)
    assert refusal.value.everywhere


def test_megatron_s_last_stage_puts_labels_where_pictures_of_one_size_would_end():
    """Why pipeline stages are refused: it has no tower, and so takes pictures for tiles. Plain Megatron, too."""
    core = pytest.importorskip("megatron.core.models.multimodal.llava_model", reason="megatron-core is not installed")
    merge = core.LLaVAModel._preprocess_data
    if "is_packed_dynamic_res" not in inspect.signature(merge).parameters:
        pytest.skip("this version has no dynamic resolution, or another form of it")
    facts, model = _adapter().read(TWO), SimpleNamespace(add_decoder=True, pre_process=False, post_process=True)
    model.img_seq_len, model._language_max_sequence_length, model.context_parallel_lm = 3, 99, 1
    model._language_is_pipeline_parallel, model.vision_model, model.sound_model = False, None, None

    def loss_mask(tiles: list[int], *, is_packed_dynamic_res: bool) -> torch.Tensor:
        rows, how = (TWO["tokens"], TWO["loss_mask"], TWO["labels"]), {"is_packed_dynamic_res": is_packed_dynamic_res}
        return merge(model, None, None, *rows, False, None, V, torch.tensor(tiles).int(), **how)[2]

    assert torch.equal(loss_mask([2, 6], is_packed_dynamic_res=True) > 0, facts.is_target_BS)
    for tiles in ([1, 1], [2, 6]):  # whatever a script passes
        found = loss_mask(tiles, is_packed_dynamic_res=False) > 0
        assert found.shape != facts.is_target_BS.shape or not torch.equal(found, facts.is_target_BS)
