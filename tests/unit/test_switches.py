"""What is switched off for a while is on again afterwards, as it was."""

from __future__ import annotations

import pytest
import torch

from regate_megatron.decoder.switches import Switch, switched_off


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.overlaps = True

    def asks(self) -> bool:
        return True


def _said(layer: _Layer) -> tuple:
    return layer.overlaps, layer.asks(), "asks" in vars(layer)


@pytest.mark.parametrize("fault", [None, RuntimeError("in the middle of a step")])
def test_attributes_and_methods_are_given_back_however_it_ends(fault):
    layers = [_Layer(), _Layer()]
    switches = [one for layer in layers for one in (Switch(layer, "overlaps", False), Switch(layer, "asks", bool))]
    try:
        with switched_off(switches):
            assert [_said(layer) for layer in layers] == [(False, False, True)] * 2
            if fault:
                raise fault
    except RuntimeError as error:
        assert error is fault
    assert [_said(layer) for layer in layers] == [(True, True, False)] * 2
