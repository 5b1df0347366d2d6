"""Families of models are known by their classes' module-qualified names; what Bridge's settings tell before step 0."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from regate_megatron.batches import FAMILIES, GPTBatches, QwenVLBatches, SwiftBatches, adapter_for
from regate_megatron.errors import ReGateError
from regate_megatron.support.bridge import check_settings


def _class(qualified: str, *bases: type, **members) -> type:
    """A class that says it is another one's: stands for packages that are not installed here."""
    module, _, name = qualified.rpartition(".")
    return type(name, bases or (object,), {"__module__": module, "__qualname__": name, **members})


def _get_rope_index(self, *args, **kwargs):
    raise AssertionError


def _qwen(kind: type):
    model = kind()
    vision = SimpleNamespace(spatial_merge_size=2)
    model.config = SimpleNamespace(image_token_id=91, video_token_id=92, vision_config=vision, context_parallel_size=1)
    model.language_model = SimpleNamespace(position_embedding_type="mrope")
    return model


QWEN = "megatron.bridge.models.qwen_vl.modeling_qwen25_vl.Qwen25VLModel"


def test_a_known_class_gets_the_adapter_of_its_row():
    text = _class("megatron.core.models.gpt.gpt_model.GPTModel")()
    text.position_embedding_type = "rope"
    assert isinstance(adapter_for(text, None), GPTBatches)
    adapter = adapter_for(_qwen(_class(QWEN, get_rope_index=_get_rope_index)), None)
    assert isinstance(adapter, QwenVLBatches) and (adapter.image_token, adapter.merge_size) == (91, 2)


@pytest.mark.parametrize(
    "name",
    [
        "megatron.bridge.models.ernie_vl.modeling_ernie45_vl.model.Ernie45VLModel",
        "megatron.bridge.models.qwen_vl.modelling_qwen35_vl.model.Qwen35VLModel",
        "somebody.qwen_vl.modeling_qwen25_vl.Qwen25VLModel",  # the right name of another module
    ],
)
def test_a_class_that_only_looks_like_a_known_one_is_refused_by_its_name(name):
    model = _qwen(_class(name, get_rope_index=_get_rope_index))
    with pytest.raises(ReGateError) as refusal:
        adapter_for(model, None)
    line = str(refusal.value)
    assert line.startswith(f"regate: model: given {name.rpartition('.')[2]} ({name}); allowed GPTModel, HybridModel, ")
    assert "Qwen25VLModel of Megatron-Bridge" in line and "; change the model class" in line
    assert refusal.value.everywhere


def test_a_class_below_a_known_one_is_that_one_unless_it_runs_otherwise():
    known = _class(QWEN, forward=_get_rope_index, get_rope_index=_get_rope_index, freeze=_get_rope_index)
    same = _class("mine.Frozen", known, freeze=_get_rope_index, __init__=lambda self: None)
    assert isinstance(adapter_for(_qwen(same), None), QwenVLBatches)
    for changed in ({"forward": _get_rope_index}, {"get_rope_index": _get_rope_index}):
        with pytest.raises(ReGateError, match=r"given Changed \(mine\.Changed\)"):
            adapter_for(_qwen(_class("mine.Changed", known, **changed)), None)


def test_bridge_s_qwen25_vl_which_cuts_no_row_is_refused_under_context_parallelism():
    model = _qwen(_class(QWEN, get_rope_index=_get_rope_index))
    model.config.context_parallel_size = 2
    with pytest.raises(ReGateError, match="Qwen25VLModel of Megatron-Bridge on 2 context ranks; allowed one") as no:
        adapter_for(model, None)
    assert no.value.everywhere


def _mcore(context: int = 2, cut: str = "zigzag", kind: str = "qwen3_vl"):
    vision = SimpleNamespace(spatial_merge_size=2, merge_kernel_size=[2, 2])
    tokens = {"image_token_id": 91, "video_token_id": 92, "media_placeholder_token_id": 93}
    tokens = SimpleNamespace(**tokens, vision_config=vision)
    model = _class("mcore_bridge.model.mm_gpt_model.MultimodalGPTModel")()
    sizes = {"context_parallel_size": context, "cp_partition_mode": cut}
    model.config = SimpleNamespace(hf_model_type=kind, llm_model_type="qwen3", hf_config=tokens, **sizes)
    return model


def test_a_row_that_context_ranks_cut_otherwise_than_plans_do_is_refused():
    with pytest.raises(
        ReGateError, match="cp_partition_mode contiguous on 2 context ranks; .*the mode to zigzag"
    ) as no:
        adapter_for(_mcore(cut="contiguous"), None)
    assert no.value.everywhere
    for model in (_mcore(), _mcore(context=1, cut="contiguous")):
        assert isinstance(adapter_for(model, None), SwiftBatches)


def test_patches_of_a_picture_of_kimi_vl_lie_row_by_row():
    """Two rows of three positions, each of two by two patches."""
    patch_ND = torch.arange(24)[:, None].expand(-1, 8).reshape(24, 2, 2, 2)
    tokens = torch.tensor([[5, *[93] * 6, 7, 8]])
    batch = {"input_ids": tokens, "labels": tokens.where(tokens == 8, -100), "position_ids": torch.arange(9)[None]}
    batch |= {"pixel_values": patch_ND, "image_grid_hws": torch.tensor([[4, 6]]), "attention_mask_2d": tokens > 0}
    facts = adapter_for(_mcore(kind="kimi_vl"), None).read(batch)
    assert facts.is_visual_BS.tolist() == [[False, *[True] * 6, False, False]]
    assert facts.media.grid_I3.tolist() == [[1, 2, 3]]
    under = [sorted(set(values)) for values in facts.media.pixels(0).tolist()]
    assert under[0] == [0, 1, 6, 7] and under[2] == [4, 5, 10, 11] and under[3] == [12, 13, 18, 19]
    for grid, says in (([1, 4, 6], None), ([2, 4, 3], "of one frame each")):  # Kimi-K2.5's, whose frames become one
        own = batch | {"grid_thws": torch.tensor([grid])}
        with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
            read = adapter_for(_mcore(kind="kimi_k25"), None).read(own)
            assert read.media.grid_I3.tolist() == facts.media.grid_I3.tolist()


def _llava(overlaps: bool, context: int = 1):
    model = _class("megatron.core.models.multimodal.llava_model.LLaVAModel")()
    model.img_seq_len, model.image_token_index, model._language_max_sequence_length = 4, -200, 12
    model._language_is_pipeline_parallel, model.tensor_model_parallel_size_lm = False, 2
    model.sequence_parallel_lm, model.tp_comm_overlap_lm, model.context_parallel_lm = True, overlaps, context
    model.config = SimpleNamespace(context_parallel_size=context)
    model.language_model = SimpleNamespace(position_embedding_type="rope")
    return model


def test_rows_of_a_llava_whose_tensor_parallel_communication_overlaps_have_the_one_length_that_it_takes():
    """Megatron-LM's script pads them to it, and the model asserts it."""
    tokens = torch.tensor([[-200, 5, 6]])
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, 3)}
    for overlaps, length in ((False, 6), (True, 12)):
        assert adapter_for(_llava(overlaps), None).read(batch).dense_length == length
    with pytest.raises(ReGateError, match="LLaVAModel with tp_comm_overlap on 2 context ranks"):
        adapter_for(_llava(True, context=2), None)


@pytest.mark.parametrize(
    ("flags", "unaligned", "aligned"),
    [
        ({"use_packed_sequence": False}, True, False),  # pretrain_vlm.py
        ({"use_packed_sequence": True}, True, True),
        ({"max_num_tiles": 1}, True, True),  # examples/multimodal
        ({}, False, False),  # a script of one's own: the model pads, and cuts rows as rows
    ],
)
def test_rows_of_a_llava_on_context_ranks_lie_as_their_script_lays_them(flags, unaligned, aligned):
    adapter = adapter_for(_llava(False, context=2), None, SimpleNamespace(**flags))
    for entries, is_packed in ((6, unaligned), (5, aligned)):  # of 9 and 8 merged positions, in multiples of 8
        tokens = torch.tensor([[-200, *range(5, 4 + entries)]])
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, entries)}
        assert (adapter.read(batch).sample_BS is not None) == is_packed


def test_every_row_names_a_class_by_its_module():
    assert all(name.startswith(("megatron.", "mcore_bridge.")) and name.count(".") >= 3 for name in FAMILIES)
    assert len({family.title for family in FAMILIES.values()}) == len(FAMILIES)


def _bridge(**settings):
    rooms = {"dist": SimpleNamespace(), "dataset": SimpleNamespace()}
    for name, value in settings.items():
        room, field = name.split("__")
        setattr(rooms[room], field, value)
    return SimpleNamespace(**rooms)


def test_settings_of_bridge_under_which_groups_are_its_own_are_refused_before_step_0():
    with pytest.raises(ReGateError) as refusal:
        check_settings(_bridge(dist__use_decentralized_pg=True))
    line = "given dist.use_decentralized_pg=True; allowed it off"
    assert line in str(refusal.value) and "; change dist.use_decentralized_pg to " in str(refusal.value)
    assert refusal.value.everywhere


@pytest.mark.parametrize("value", [None, False])
def test_settings_of_bridge_that_leave_groups_alone_pass(value):
    check_settings(_bridge(dist__use_decentralized_pg=value, dataset__packing_buffer_size=32))
    check_settings(_bridge())  # versions without the field
