"""random-LTD: every layer but the first and the last runs on its own random positions.

With DeepSpeed installed, its own ``RandomLayerTokenDrop`` wraps Megatron's layers: its sampling, its gathers and
scatters with their gradients. Its kernels (``token_sort_``, ``token_gather``, ``token_scatter_``) exist for CUDA only;
on a CPU :class:`TorchKernels` stands in for them, with the same index operations in torch. Without DeepSpeed the same
is done with :mod:`benchmarks.kept`.

DeepSpeed hands a layer its arguments as they are, so rotary frequencies would be those of positions 0 to K−1 and of
another length than the hidden states: the wrapped layer cuts them. That is no cost, and not right for training; other
than that a layer on K positions costs the same whichever they are.

Shapes: B rows, S positions, K kept, H hidden.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kept import MaskTheLoss, PerLayer, round_trip
from benchmarks.models import decoder_of


class TorchKernels:
    """DeepSpeed's random-LTD kernels in torch; activations are [S, B, H]."""

    @staticmethod
    def token_sort_(index_LBK: Tensor, length: int) -> Tensor:
        """Ascending positions."""
        return index_LBK.sort(dim=-1).values

    @staticmethod
    def token_gather(activation_SBH: Tensor, index_BK: Tensor, batch_first: bool) -> Tensor:
        """The sampled positions, [K, B, H]."""
        return activation_SBH.flatten(0, 1).index_select(0, _entries(index_BK)).view(-1, *activation_SBH.shape[1:])

    @staticmethod
    def token_scatter_(all_SBH: Tensor, part_KBH: Tensor, index_BK: Tensor, batch_first: bool) -> Tensor:
        """``part`` at its positions in ``all``, in place."""
        all_SBH.flatten(0, 1).index_copy_(0, _entries(index_BK), part_KBH.reshape(-1, part_KBH.shape[-1]))
        return all_SBH


def _entries(index_BK: Tensor) -> Tensor:
    rows = len(index_BK)
    return (index_BK.t().long() * rows + torch.arange(rows)).reshape(-1)


def why_not_itself() -> str:
    """What DeepSpeed says when its kernels are asked for on this machine; empty when they load."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepspeed.ops.op_builder import RandomLTDBuilder

            RandomLTDBuilder().load()
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""


class DeepSpeedRandomLTD(MaskTheLoss):
    """Megatron's layers inside DeepSpeed's wrappers, all but the first and the last."""

    name = "random-LTD (DeepSpeed)"

    def _prepare(self) -> None:
        from deepspeed.ops.random_ltd import dropping_utils
        from deepspeed.runtime.data_pipeline import constants as names
        from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop

        if why_not_itself():
            dropping_utils.random_ltd_module = TorchKernels()
        layers = decoder_of(self.model).layers
        self._scheduler = _Scheduler(self, len(layers) - 2, {names.RANDOM_LTD_MAX_VALUE: self.size.length})
        settings = {
            names.RANDOM_LTD_MODEL_MASK_NAME: None,
            names.RANDOM_LTD_MICRO_BATCH_SIZE: self.size.rows,
            names.RANDOM_LTD_HIDDEN_STATE_ORDER: "seq_batch_dim",
            names.RANDOM_LTD_MODEL_TYPE: "decoder",
        }
        for number, index in enumerate(range(1, len(layers) - 1)):
            wrapped = RandomLayerTokenDrop(_CutsRotary(layers[index]))
            wrapped.init_config(settings, self._scheduler, number)
            layers[index] = wrapped
        self.model.train()


class OwnRandomLTD(PerLayer):
    """The same without DeepSpeed: one random set per layer, all but the first and the last."""

    name = "random-LTD (own)"

    def _prepare(self) -> None:
        for layer in decoder_of(self.model).layers[1:-1]:
            layer.forward = _resampling(self, round_trip(self, layer, type(layer).forward))


class _Scheduler:
    """What DeepSpeed's wrappers ask theirs: how many positions now, and what the first layer sampled."""

    def __init__(self, runner: Any, num_layers: int, state: dict[str, Any]) -> None:
        self._runner, self.random_ltd_layer_num, self.state = runner, num_layers, state

    def get_current_seq(self) -> int:
        """K."""
        return self._runner.plan.length


class _CutsRotary(nn.Module):
    """A layer whose rotary frequencies are cut to the length of what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """The layer on K positions."""
        return self.layer(hidden_states, rotary_pos_emb=rotary_pos_emb[: len(hidden_states)], **kwargs)


def _resampling(runner: Any, forward: Any) -> Any:
    """``forward`` on positions drawn anew."""

    def resampled(*args: Any, **kwargs: Any) -> Any:
        weight_BS = torch.ones(runner.size.rows, runner.size.length)
        runner.entry_X = _entries(torch.multinomial(weight_BS, runner.plan.length).sort(dim=-1).values)
        return forward(*args, **kwargs)

    return resampled


def random_ltd_class() -> type:
    """DeepSpeed's own where it is installed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import deepspeed  # noqa: F401
    except ImportError:
        return OwnRandomLTD
    return DeepSpeedRandomLTD
