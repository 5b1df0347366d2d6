"""Adapters of families with one id per visual position: GLM-4.5V, Ministral 3 and MIMO."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import MimoBatches, QwenVLBatches, SizedPictures, StepFacts, adapter_for
from regate_megatron.errors import ReGateError

PICTURE, TEXT = 9, [1, 2, 3]


def _batch(*rows: list[int], **visual: torch.Tensor) -> dict:
    """Rows whose text beneath the last placeholder is a target, with what lies in ``visual_inputs``."""
    tokens = torch.tensor(rows)
    mask = (torch.arange(tokens.shape[1]) > 4).expand(tokens.shape).float()
    inputs = SimpleNamespace(normalized_for_model=lambda: visual) if visual else None
    return {"input_ids": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask, "visual_inputs": inputs}


ROW = [1, PICTURE, PICTURE, 7, PICTURE, PICTURE, 2, 3]  # two frames, or two lines


def _glm(kinds: list[int]) -> tuple[QwenVLBatches, dict]:
    adapter = QwenVLBatches(PICTURE, PICTURE, merge_size=1, takes_kinds=True)
    grid, frames = torch.tensor([[2, 1, 2]]), torch.randn(4, 6)
    return adapter, _batch(
        ROW, mm_token_type_ids=torch.tensor([kinds]), pixel_values_videos=frames, video_grid_thw=grid
    )


def test_a_video_whose_frames_have_the_ids_of_pictures_is_one_clip():
    adapter, batch = _glm([0, 2, 2, 0, 2, 2])  # shorter than the row, which the collator has padded
    facts = adapter.read(batch)
    assert torch.where(facts.is_visual_BS[0])[0].tolist() == [1, 2, 4, 5]
    assert facts.media.grid_I3.tolist() == [[2, 1, 2]] and facts.media.count_I.tolist() == [4]
    assert not facts.is_target_BS[0, 5] and facts.has_visual_loss_BS[0, 5]


@pytest.mark.parametrize(
    ("kinds", "words"), [([0, 2, 2, 2, 2, 2], "and there alone"), ([0, 1, 1, 0, 1, 1], "4 placeholders without")]
)
def test_kinds_that_do_not_fit_are_refused(kinds, words):
    adapter, batch = _glm(kinds)
    with pytest.raises(ValueError, match=words):
        adapter.read(batch)


@pytest.mark.parametrize("shape", [(1, 9), (2, 8)])
def test_kinds_of_other_rows_are_refused(shape):
    """As those of rows that were packed, or cut, without them."""
    adapter = QwenVLBatches(PICTURE, PICTURE, merge_size=1, takes_kinds=True)
    kinds = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"for rows \(1, 8\)"):
        adapter.read(_batch(ROW, mm_token_type_ids=kinds))


def _pictures(size: tuple[int, int], fill: float = 0.0) -> dict:
    pixels = torch.full((1, 3, 8, 8), fill)
    pixels[:, :, :4, :4] = torch.arange(16.0).view(4, 4)
    return _batch(ROW, pixel_values=pixels, image_sizes=torch.tensor([size]))


def test_a_picture_has_the_cells_of_its_own_size_and_what_pads_it_is_no_part_of_it():
    adapter = SizedPictures(image_token=PICTURE, cell=2)
    facts, padded_otherwise = adapter.read(_pictures((4, 5))), adapter.read(_pictures((4, 4), fill=5.0))
    assert facts.media.grid_I3.tolist() == [[1, 2, 2]]
    assert facts.media.pixels(0).shape[0] == 4 and facts.media.pixels(0)[3].min() == 10
    plain = adapter.read(_pictures((4, 4)))
    assert torch.equal(padded_otherwise.difficulty_key_N2, plain.difficulty_key_N2)
    assert not torch.equal(facts.difficulty_key_N2, plain.difficulty_key_N2)


@pytest.mark.parametrize("size", [(4, 8), (2, 4)])
def test_a_picture_that_does_not_fit_its_placeholders_is_refused(size):
    with pytest.raises(ValueError, match="placeholders"):
        SizedPictures(image_token=PICTURE, cell=2).read(_pictures(size))


def _mimo_batch(pictures: int, **more) -> dict:
    batch = _batch(ROW, ROW)
    images = torch.arange(pictures * 3 * 4 * 4).view(pictures, 3, 4, 4).float()
    return batch | {"modality_inputs": {"images": {"clip_encoder": {"x": images}}}} | more


def test_pictures_of_mimo_share_the_placeholders_evenly():
    facts = MimoBatches(("images",), (PICTURE,)).read(_mimo_batch(2))
    assert facts.media.count_I.tolist() == [4, 4] and facts.media.sample_I.tolist() == [0, 1]
    assert facts.media.grid_I3.tolist() == [[1, 2, 2]] * 2


def test_packed_samples_of_mimo_have_the_keys_they_have_in_rows_of_their_own():
    adapter, rows = MimoBatches(("images",), (PICTURE,)), _mimo_batch(2)
    packed = {name: value.reshape(1, -1) if torch.is_tensor(value) else value for name, value in rows.items()}
    packed["packing_kwargs"] = {"cu_seqlens_q": torch.tensor([0, 8, 16])}
    assert torch.equal(adapter.read(packed).difficulty_key_N2, adapter.read(rows).difficulty_key_N2)


def test_placeholders_of_mimo_without_pictures_and_pictures_of_uneven_sizes_are_refused():
    adapter = MimoBatches(("images",), (PICTURE,))
    with pytest.raises(ValueError, match="8 placeholders without modality_inputs"):
        adapter.read(_mimo_batch(2, modality_inputs=None))
    with pytest.raises(ValueError, match="8 placeholders of images for 3 pictures"):
        adapter.read(_mimo_batch(3))


def test_pictures_of_mimo_without_placeholders_are_refused_and_no_pictures_are_none():
    adapter, text = MimoBatches(("images",), (PICTURE,)), _batch([1, 2, 3, 4, 5, 6, 7, 8])
    given = {"modality_inputs": _mimo_batch(2)["modality_inputs"]}
    with pytest.raises(ValueError, match=r"media of \[0, 0\] positions for samples of \[0\] placeholders"):
        adapter.read(text | given)
    given["modality_inputs"]["images"]["clip_encoder"]["x"] = torch.zeros(0, 3, 4, 4)
    assert len(adapter.read(text | given).media.count_I) == 0


@pytest.mark.parametrize(
    ("beside", "grid", "lead"), [(5, [1, 2, 2], 1), (3, [0, 0, 0], 0)], ids=["class token", "no square cells"]
)
def test_what_is_known_of_a_picture_does_not_hang_on_those_beside_it(beside, grid, lead):
    """Or the same sample would keep other positions in another microbatch."""
    tokens = torch.tensor([[1, *[9] * 4, *[8] * beside, 2]])
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(tokens.shape)}
    batch["modality_inputs"] = {name: {"one": {"x": torch.zeros(1, 3, 4, 4)}} for name in ("plain", "other")}
    facts = MimoBatches(("plain", "other"), (9, 8)).read(batch)
    assert facts.media.count_I.tolist() == [4, beside]
    assert StepFacts([facts]).grid_I3.tolist() == [[1, 2, 2], grid]
    assert facts.media.lead_I.tolist() == [0, lead]
    assert (facts.media.pixels is None) == (grid == [0, 0, 0])


def _class(qualified: str) -> type:
    module, _, name = qualified.rpartition(".")
    return type(name, (), {"__module__": module, "__qualname__": name})


def _mimo(positions: str = "rope", grids: dict | None = None, encoders: int = 1, kind: str = "vision", stages: int = 1):
    model = _class("megatron.core.models.mimo.model.base.MimoModel")()
    model.config = SimpleNamespace(pipeline_model_parallel_size=stages)
    name = {"vision": "vision.VisionModalitySubmodules", "audio": "audio.AudioModalitySubmodules"}.get(kind)
    name = name or "wrapper.DistributedDataParallel"
    modality = _class(f"megatron.core.models.mimo.submodules.{name}")()
    if kind != "wrapped":
        modality.encoders = dict.fromkeys(range(encoders))
    model.language_model = SimpleNamespace(position_embedding_type=positions)
    model.mimo_config = SimpleNamespace(module_to_grid_map=grids)
    model.modality_submodules, model.special_token_ids = {"images": modality}, {"images": PICTURE}
    return model


def test_a_mimo_model_of_pictures_is_known():
    assert adapter_for(_mimo(), None) == MimoBatches(("images",), (PICTURE,))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_mimo(grids={"language": 1}), "module_to_grid_map"),
        (_mimo(positions="mrope"), "mrope positions"),
        (_mimo(encoders=2), "VisionModalitySubmodules with 2 encoders"),
        (_mimo(stages=2), "given MimoModel: 2 pipeline stages"),
        (_mimo(kind="audio"), "modality images of AudioModalitySubmodules"),
        (_mimo(kind="wrapped"), "modality images of DistributedDataParallel"),
    ],
)
def test_a_mimo_model_that_nobody_has_run_is_refused(model, words):
    with pytest.raises(ReGateError, match=words) as refusal:
        adapter_for(model, None)
    assert refusal.value.everywhere
