"""Multi-token prediction in a short run: what lies ahead is looked up before anything is left out.

Depth d reads at position i, beside the hidden state, the token at i + d, and predicts the one after it. Megatron gets
there by rolling ids, labels and loss mask by one, depth after depth. Here they are rolled at full length and gathered
then, so that i + d is the true place and not the next kept one. The layers attend to kept positions, as all others do.

Depth d has a loss at i where i is kept and the batch's own loss mask, before elision, has one at i + d (everywhere, if
the host gives its model no loss mask: Megatron-Bridge). Its mean is over those; how it is weighed, logged and counted
is Megatron's ``process_mtp_loss``. Difficulty and reference losses know the main head alone.

Means: instance attributes ``_postprocess`` on the model and ``_get_embeddings`` on the layers, which run Megatron's
functions with another ``roll_tensor`` among the names they see.

Shapes: B rows, S dense positions, k slots that run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor

from regate_megatron.decoder.compaction import DecoderHook, check_length
from regate_megatron.decoder.current import CurrentMicrobatch
from regate_megatron.decoder.exchange import ShardedPlan
from regate_megatron.decoder.experts import Experts
from regate_megatron.decoder.losses import LossHook
from regate_megatron.decoder.positions import layers_ahead
from regate_megatron.errors import refuse


class AheadHook:
    """Hook on the layers that predict ahead, in the chunk that computes the loss.

    Args:
        model: the language model, a ``GPTModel`` with ``mtp``.
        decoder, loss: the other hooks on it.
    """

    def __init__(self, model: Any, current: CurrentMicrobatch, decoder: DecoderHook, loss: LossHook) -> None:
        self.model, self.current, self.decoder, self.loss = model, current, decoder, loss
        self.experts = Experts(model.config, layers_ahead(model))
        self._rolls: Rolls | None = None
        model._postprocess = self.postprocess
        for layer in model.mtp.layers:
            layer._get_embeddings = partial(self.embed, layer)

    def detach(self) -> None:
        """Give the model and its layers their own methods back."""
        self.experts.detach()
        del self.model._postprocess
        for layer in self.model.mtp.layers:
            del layer._get_embeddings

    def describe(self) -> str:
        """One line: what is attached where."""
        return f"multi-token prediction ({self.model.config.mtp_num_layers}): tokens and labels of their true places"

    def postprocess(self, **arguments: Any) -> Tensor:
        """What the model does after its decoder; [B, S] losses of the main head.

        Raises:
            ReGateError: a loss mask of another length than was read, or a padding mask of the model's own for experts.
        """
        plan, inner = self.current.plan, type(self.model)._postprocess
        process = inner.__globals__["process_mtp_loss"]
        if plan is not None:
            arguments, self._rolls = self._short(arguments, plan)
            process = _seeing(process, roll_tensor=self._rolls)

        def without_hook(**given: Any) -> Any:
            """Depths get the loss of labels and logits as they are, and nobody learns from it."""
            return process(**given | {"compute_language_model_loss": self.loss.inner})

        try:
            return _seeing(inner, process_mtp_loss=without_hook)(self.model, **arguments)
        finally:
            self._rolls = None

    def embed(self, layer: Any, **arguments: Any) -> Any:
        """Roll ids by one and embed them; recompute never gets here."""
        inner = type(layer)._get_embeddings
        return (inner if self._rolls is None else _seeing(inner, roll_tensor=self._rolls))(layer, **arguments)

    def _short(self, arguments: dict[str, Any], plan: ShardedPlan) -> tuple[dict[str, Any], Rolls]:
        """The arguments at kept positions, but for ids, labels and loss mask, which are whole until they are rolled."""
        padding_mask = arguments.get("padding_mask")
        if padding_mask is not None and self.experts.has_routers:
            form = {"allowed": "none with multi-token prediction", "change": "the forward step, or --mtp-num-layers"}
            raise refuse("padding mask", given="a padding_mask of the model's own", **form)
        rolls = Rolls(arguments.get("packed_seq_params"), plan)
        arguments = self.decoder.attended(dict(arguments), plan)
        if "padding_mask" in arguments:
            arguments["padding_mask"] = rolls.fill = self.experts.padding(None, plan)
        if (loss_mask := arguments.get("loss_mask")) is not None:
            check_length("loss mask", loss_mask.shape[1], plan.dense_length)
            rolls.know(loss_mask, plan.loss_mask_BS.to(loss_mask))
        return arguments, rolls


class Rolls:
    """``roll_tensor`` for one microbatch: rolls what is whole, and hands on its kept positions, with 0 in fill.

    Args:
        packing: where segments of the whole rows lie; None for rows of one sample.
        plan: of the microbatch.

    Attributes:
        fill: a mask of slots that stays as it is at every depth.
    """

    def __init__(self, packing: Any, plan: ShardedPlan) -> None:
        self._packing, self._plan = packing, plan
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}  # beside the tensor it is known by, which so stays alive
        self.fill: Tensor | None = None

    def know(self, tensor: Tensor, whole: Tensor) -> None:
        """Roll ``whole`` where ``tensor`` is given."""
        self._whole[id(tensor)] = tensor, whole

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The tensor, […, S] or one returned before, rolled, […, k], and its sum."""
        from megatron.core.transformer.multi_token_prediction import roll_tensor

        if tensor is self.fill:
            return tensor, tensor.sum()
        _, whole = self._whole.get(id(tensor), (tensor, tensor))
        whole, _ = roll_tensor(whole, *args, **kwargs | {"packed_seq_params": self._packing})
        short = self._plan.tokens.to_short(_turned(whole))
        short = _turned(short).masked_fill(self._plan.is_fill_Bk, 0)
        self.know(short, whole)
        return short, short.sum()


def _turned(tensor: Tensor) -> Tensor:
    """Axes in reverse: […, B, S] to [S, B, …], and back."""
    return tensor.permute(*reversed(range(tensor.dim())))


def _seeing(function: FunctionType, **names: Callable[..., Any]) -> FunctionType:
    """The function with these names in place of its module's; nobody else's calls change."""
    globals_, closure = function.__globals__ | names, function.__closure__
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
