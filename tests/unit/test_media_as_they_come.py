"""Rows of the Qwen-VL families as data sets have them: pictures of several sizes, clips with timestamps, cut rows.

Read by the adapter, planned by the planner: what runs of every picture and clip is its own share, by every rule.
"""

from __future__ import annotations

import pytest
import torch

from regate_megatron.batches import PaddedRows, SwiftBatches
from tests.unit.test_batches_vlm import IGNORE, PICTURE_TOKEN, QWEN, VIDEO_TOKEN, _grid, _qwen
from tests.unit.test_visual import _plan

P, V, START, END = PICTURE_TOKEN, VIDEO_TOKEN, 88, 89
RULES = ("random", "even", "static", "detail")
# Merged: 2 x 2 and 2 x 4 positions in the first row, none in the second, 1 x 2 inside the answer of the third.
SIZES = ((1, 4, 4), (1, 4, 8), (1, 2, 4))
INTERLEAVED = [
    [5, START, *[P] * 4, END, 6, START, *[P] * 8, END, 7, 8, 9, 4],
    [5, 6, 7, 8, 9, 4, 3, 5, 6, 7, 8, 9, 4, 3, 5, 6, 7, 8, 9, 4, 3, 2],
    [5, 6, 7, 8, START, P, P, END, 9, 4, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]
ANSWERS = [[0] * 18 + [1, 1, 1, 0], [0, 0, 0, *[1] * 18, 0], [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, *[0] * 12]]
# Two frames of 2 x 2, each behind its time; the second is the first but for its last position.
TIMED = [[11, START, *[V] * 4, END, 12, START, *[V] * 4, END, 7, 8, 9, 4, 3, 2]]
TIMED_ANSWER = [[0] * 14 + [1] * 5 + [0]]


def _interleaved() -> dict:
    patches = torch.arange(56.0)[:, None] + torch.arange(6.0)
    return _qwen(INTERLEAVED, ANSWERS, pixel_values=patches, image_grid_thw=_grid(*SIZES))


def _timed(**more) -> dict:
    frame = torch.arange(16.0)[:, None] * torch.tensor([1.0, -2.0, 3.0, 1.0, 0.0, 5.0]) + 1
    moved = frame.clone()
    moved[12:] = -frame[12:]
    return _qwen(
        TIMED, TIMED_ANSWER, pixel_values_videos=torch.cat([frame, moved]), video_grid_thw=_grid((2, 4, 4)), **more
    )


def test_pictures_of_several_sizes_are_media_of_their_rows():
    media = QWEN.read(_interleaved()).media
    assert media.sample_I.tolist() == [0, 0, 2] and media.count_I.tolist() == [4, 8, 2]
    assert media.grid_I3.tolist() == [[1, 2, 2], [1, 2, 4], [1, 1, 2]]


@pytest.mark.parametrize("rule", RULES)
def test_each_picture_keeps_its_share_and_rows_of_text_lose_none(rule):
    kept = _plan(QWEN.read(_interleaved()), visual_keep_ratio=0.5, visual_score=rule)
    assert [kept[0][2:6].count("x"), kept[0][9:17].count("x"), kept[2][5:7].count("x")] == [2, 4, 1]
    assert kept[0][:2] + kept[0][6:9] + kept[0][17:] == "x" * 10 and kept[1] == "x" * 22
    assert kept[2][:5] + kept[2][7:11] == "x" * 9 and kept[2][11:] == "." * 11


def test_a_picture_inside_an_answer_is_no_target_and_what_predicts_text_round_it_is():
    facts = QWEN.read(_interleaved())
    assert torch.where(facts.is_target_BS[2])[0].tolist() == [2, 3, 7, 8, 9]
    assert facts.label_BS[2][facts.is_target_BS[2]].tolist() == [8, START, 9, 4, 3]


@pytest.mark.parametrize("rule", RULES)
def test_a_clip_whose_frames_stand_behind_their_times_is_one_clip_and_every_time_runs(rule):
    facts = QWEN.read(_timed())
    assert facts.media.count_I.tolist() == [8] and facts.media.grid_I3.tolist() == [[2, 2, 2]]
    (kept,) = _plan(facts, visual_keep_ratio=5 / 8, visual_score=rule)
    assert kept[2:6].count("x") + kept[9:13].count("x") == 5
    assert kept[:2] + kept[6:9] + kept[13:] == "x" * 12


def test_static_finds_over_the_text_between_two_frames_what_moved():
    (kept,) = _plan(QWEN.read(_timed()), visual_keep_ratio=5 / 8, visual_score="static")
    assert (kept[2:6], kept[9:13]) == ("xxxx", "...x")


def test_seconds_between_frames_reach_the_positions_and_the_keys():
    """Qwen2.5-VL's: they space the frames. Qwen3-VL's batches have none."""
    seen = []

    def rope_index(tokens, kinds, images, videos, *, second_per_grid_ts, attention_mask):
        seen.append(second_per_grid_ts.tolist())
        return torch.zeros(3, *tokens.shape), None

    adapter = type(QWEN)(P, V, 2, rope_index)
    slow, fast = (adapter.read(_timed(second_per_grid_ts=torch.tensor([one]))) for one in (2.0, 0.5))
    assert seen == [[2.0], [0.5]]
    assert not torch.equal(slow.reference_key_N2, fast.reference_key_N2)


@pytest.mark.parametrize(("length", "words"), [(12, r"media of \[4, 8, 2\]"), (5, r"media of \[4, 8, 2\]")])
def test_a_row_cut_inside_a_picture_is_one_line(length, words):
    """No model of these families runs it, dense or not: features and placeholders do not pair."""
    with pytest.raises(ValueError, match=words):
        PaddedRows(adapter=QWEN, length=length).read(_interleaved())


def test_a_row_cut_behind_its_pictures_keeps_their_shares():
    facts = PaddedRows(adapter=QWEN, length=18).read(_interleaved())
    kept = _plan(facts, visual_keep_ratio=0.5, visual_score="even")
    assert facts.dense_length == 18
    assert [kept[0][2:6].count("x"), kept[0][9:17].count("x"), kept[2][5:7].count("x")] == [2, 4, 1]


def test_ms_swift_s_rows_of_the_same_media_are_the_same():
    """Labels not shifted, media beside the tokens; packed, each sample's positions begin anew."""
    given, usual = _interleaved(), QWEN.read(_interleaved())
    labels = torch.roll(given["labels"], 1, dims=1)
    labels[:, 0] = IGNORE
    media = {name: getattr(given["visual_inputs"], name) for name in ("pixel_values", "image_grid_thw")}
    places = torch.arange(22).expand(3, -1)
    adapter = SwiftBatches(type(QWEN)(P, V, 2, takes_positions=True))
    rows = adapter.read({"input_ids": given["input_ids"], "labels": labels, "position_ids": places, **media})
    flat = {"input_ids": given["input_ids"].view(1, -1), "labels": labels.view(1, -1)}
    packed = adapter.read(flat | {"position_ids": places.reshape(1, -1), "seq_lens": [22, 22, 22], **media})
    for facts in (rows, packed):
        assert torch.equal(facts.is_target_BS.view(3, -1), usual.is_target_BS)
        assert facts.media.sample_I.tolist() == [0, 0, 2] and facts.media.count_I.tolist() == [4, 8, 2]
        kept = "".join(_plan(facts, visual_keep_ratio=0.5, visual_score="even"))
        assert [kept[2:6].count("x"), kept[9:17].count("x"), kept[49:51].count("x")] == [2, 4, 1]
