"""Ways to run a step on the same kept positions: ours, and what others do. The plan is made beforehand.

* **compact** (ours): gather once after the dense layers, run short to the loss (`regate_megatron.decoder`).
* **per layer**: every layer gathers its positions, runs on them and scatters the result back, as ReGATE's paper
  describes it; final norm, LM head and loss see all positions.
* **random-LTD**: as *per layer*, with another random set in every layer; see random_ltd.py.
* **mask the loss**: elided targets have loss mask 0 and everything runs (Rho-1, ESLM).
* **dense**: everything runs.

On the kept positions *per layer* and *compact* compute the same losses (tested): after the dense layers an inactive
position is read by nobody.

Shapes: B rows, S positions, K kept, H hidden, D rotary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Clock
from benchmarks.models import Size, decoder_of
from benchmarks.stepping import Runner, Step
from regate_megatron.decoder import CurrentMicrobatch, DecoderHook, Layout, LossHook, shard_plans
from regate_megatron.method.plan import MicrobatchPlan


def random_plan(size: Size, keep_ratio: float, seed: int) -> MicrobatchPlan:
    """A plan that keeps all context and ``ceil(p·T)`` random targets of each row; no fill."""
    generator = torch.Generator().manual_seed(seed)
    context = size.image + size.prompt
    num_kept = context + -int(-keep_ratio * (size.length - context) // 1)
    kept_BS = torch.zeros(size.rows, size.length, dtype=torch.bool)
    kept_BS[:, :context] = True
    for row in range(size.rows):
        chosen = torch.randperm(size.length - context, generator=generator)[: num_kept - context]
        kept_BS[row, context + chosen] = True
    return MicrobatchPlan.of(kept_BS, num_kept)


class Planned(Runner):
    """Steps of a model under plans made beforehand; this one runs everything.

    Args:
        dense_layers: how many layers see every position.
    """

    name = "dense"

    def __init__(self, size: Size, dense_layers: int, *, like: Any = None) -> None:
        super().__init__(size, like=like)
        self.dense_layers = dense_layers
        self.language_model = getattr(self.model, "language_model", self.model)
        self.plan: MicrobatchPlan | None = None
        self._prepare()

    def step_on(self, batch: dict[str, Any], plan: MicrobatchPlan) -> Step:
        """One step; every way gets the loss mask of the plan but the dense one."""
        self._clear()
        self.plan = plan
        batch = self._edit(batch, plan)
        start = Clock()
        self._run_planned(batch)
        return Step(start.elapsed(), self.timer.spent, plan.length)

    def _prepare(self) -> None:
        """Change the model once."""

    def _edit(self, batch: dict[str, Any], plan: MicrobatchPlan) -> dict[str, Any]:
        return batch

    def _run_planned(self, batch: dict[str, Any]) -> None:
        self._run(batch, self.schedule)


class MaskTheLoss(Planned):
    """Everything runs; elided targets have no loss."""

    name = "mask the loss"

    def _edit(self, batch: dict[str, Any], plan: MicrobatchPlan) -> dict[str, Any]:
        mask = batch["loss_mask"]
        elided = ~plan.kept_mask()[:, -mask.shape[1] :]  # an image comes first, and is all context
        return dict(batch, loss_mask=mask.masked_fill(elided, 0))


class Compact(MaskTheLoss):
    """Ours: the package's own hooks, without its planner."""

    name = "compact once (ours)"

    def _prepare(self) -> None:
        self._current = CurrentMicrobatch()
        DecoderHook(self.language_model, self._current, dense_layers=self.dense_layers)
        LossHook(self.language_model, self._current)

    def _run_planned(self, batch: dict[str, Any]) -> None:
        (sharded,) = shard_plans([self.plan], Layout(), torch.device("cpu"), moves_hidden=True, moves_tokens=True)
        with self._current.running(sharded, None):
            self._run(batch, self.schedule)


class PerLayer(MaskTheLoss):
    """Each layer after the dense ones gathers kept positions, runs, and scatters them back."""

    name = "gather and scatter per layer"

    def _prepare(self) -> None:
        for layer in decoder_of(self.model).layers[self.dense_layers :]:
            layer.forward = round_trip(self, layer, type(layer).forward)

    def _run_planned(self, batch: dict[str, Any]) -> None:
        keep_KB = self.plan.keep_idx_BK.t()
        rows = keep_KB.shape[1]
        table_S11D = self.language_model.rotary_pos_emb.get_emb(self.size.length)
        self.rotary_KB1D = table_S11D[:, 0, 0][keep_KB][:, :, None]
        self.entry_X = (keep_KB * rows + torch.arange(rows)).reshape(-1)
        self._run(batch, self.schedule)


def round_trip(runner: PerLayer, layer: Any, forward: Any) -> Any:
    """The forward of a layer on the kept positions of the current plan."""

    def there_and_back(hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        shape, width = hidden_states.shape, hidden_states.shape[-1]
        flat_XH = hidden_states.reshape(-1, width)
        short_KBH = flat_XH.index_select(0, runner.entry_X).view(-1, shape[1], width)
        output_KBH, *others = forward(layer, short_KBH, *args, rotary_pos_emb=runner.rotary_KB1D, **kwargs)
        whole_XH = flat_XH.index_copy(0, runner.entry_X, output_KBH.reshape(-1, width))
        return whole_XH.view(shape), *others

    return there_and_back
