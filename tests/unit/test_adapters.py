"""Adapters of every framework in the table: told by their names, switched off for the base, switched on again."""

from types import SimpleNamespace

import pytest
import torch

from regate_megatron import compat
from regate_megatron.config import ReGateConfig, flag
from regate_megatron.support import HostRun
from regate_megatron.support.setting import Setting
from regate_megatron.support.training import TRAINING_RULES
from regate_megatron.teacher.base import _as_base

LAYER = "decoder.layers.0.self_attention.linear_qkv"


class OfBridge(torch.nn.Linear):
    """A layer with an adapter, as Megatron-Bridge has them."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._adapter_enabled, self.adapter = True, torch.nn.Linear(2, 2)

    def is_on(self) -> bool:
        return self._adapter_enabled


class OfPeft(torch.nn.Linear):
    """The same as peft has them: adapters have names, of which some are active."""

    _active_adapter = "default"

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})

    def is_on(self) -> bool:
        return "default" in self._active_adapter


class Model(torch.nn.Module):
    """A language model of one layer."""

    def __init__(self, layer: torch.nn.Module, scatters: bool = True, **settings) -> None:
        super().__init__()
        self.linear, self.embedding = layer, torch.nn.Identity()
        self.embedding.scatter_to_sequence_parallel = scatters
        self.config = SimpleNamespace(**{"sequence_parallel": False} | settings)
        layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)


@pytest.mark.parametrize("layer", [OfBridge, OfPeft])
def test_adapters_are_off_for_the_base_and_on_afterwards(layer):
    model = Model(layer())
    assert model.linear.is_on() and model.training
    with pytest.raises(KeyboardInterrupt), _as_base([model]):
        assert not model.linear.is_on() and not model.linear.training
        raise KeyboardInterrupt
    assert model.linear.is_on() and model.linear.training


@pytest.mark.parametrize(
    ("name", "is_adapter", "base"),
    [
        (f"{LAYER}.weight", False, f"{LAYER}.weight"),
        (f"{LAYER}.adapter.linear_in.weight", True, None),
        (f"{LAYER}.lora_B.default.weight", True, None),
        (f"{LAYER}.base_layer.weight", False, f"{LAYER}.weight"),
        (f"{LAYER}.modules_to_save.default.weight", False, f"{LAYER}.modules_to_save.default.weight"),
    ],
)
def test_names_tell_adapters_from_their_base(name, is_adapter, base):
    assert compat.is_adapter(name) == is_adapter
    assert is_adapter or compat.base_name(name) == base


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Model(OfPeft()), None),
        (Model(OfPeft(), sequence_parallel=True), None),
        (Model(OfPeft(), scatters=False), None),
        (Model(OfPeft(), scatters=False, sequence_parallel=True), "sequence_parallel that the multimodal"),
        (Model(OfBridge(), fp8="e4m3"), "and fp8"),
        (Model(torch.nn.Linear(2, 2)), "whose adapters cannot be switched off"),
        (Model(OfPeft()).requires_grad_(), "whose linear.weight learns beside its adapters"),
    ],
)
def test_only_a_base_that_stays_and_runs_alone_is_the_teacher(model, given):
    (rule,) = (one for one in TRAINING_RULES if one.what == flag("teacher_load"))
    found = rule.find(Setting([model], ReGateConfig(teacher_load="student"), HostRun(has_adapters=True)))
    assert found is None if given is None else given in found
