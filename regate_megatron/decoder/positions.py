"""Rotary positions of a short run: kept positions are rotated by their original places.

What the layers get is one argument, ``rotary_pos_emb`` [K, B, 1, D], which recompute saves like any other:

- rope and yarn, with any scaling, share or interleaving: rows of the table that the model's own rotary module makes for
  the dense length. (yarn's mscale is read by the attention from its config.)
- mrope: the table depends on the batch's position ids, so the model's dense table of this microbatch is gathered. Under
  context parallelism it holds this rank's positions, so it travels as labels do, on every stage.
- multi-latent attention makes its table inside each layer, from the length of what it is given. There the argument
  carries the table past the layer, see :class:`HandedRotary`. (mcore-bridge's takes the argument, as others do.)
- queries that are scaled by their place: see :mod:`.query_scale`.
- learned positions and none: nothing to do, positions are in the embedding or nowhere.

Shapes: S dense positions, K slots that run, k those of this context rank (all of them in packed rows), B rows, D rotary
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from regate_megatron.compat import is_one_of
from regate_megatron.decoder.exchange import ShardedPlan
from regate_megatron.decoder.query_scale import QueryScale, scales_queries
from regate_megatron.errors import refuse


class Positions:
    """Positions of one model chunk.

    Args:
        model: the language model.
        arrives_short: the model's input holds kept positions only, and so do the position ids it is given.
    """

    def __init__(self, model: Any, *, arrives_short: bool) -> None:
        self.model = model
        self.is_dense_given = model.position_embedding_type == "mrope" and not arrives_short
        self.is_short_given = model.position_embedding_type == "mrope" and arrives_short
        attentions = [getattr(layer, "self_attention", None) for layer in (*model.decoder.layers, *layers_ahead(model))]
        self.handed = [HandedRotary(one) for one in attentions if _makes_its_table(one)]
        self.scales = [QueryScale(one) for one in attentions if scales_queries(one)]
        self._most = _most_positions(model)
        self._tables: dict[int, Tensor] = {}

    def detach(self) -> None:
        """Take every hook off the attention layers."""
        for hooks in (self.handed, self.scales):
            while hooks:
                hooks.pop().detach()

    @property
    def cuts_rows_whole(self) -> bool:
        """Whether the model cuts the table of a packed row over context ranks as if it were one segment."""
        return self.is_dense_given and is_one_of(self.model, ("megatron.core.models.gpt.gpt_model.GPTModel",))

    def check_length(self, longest: int) -> None:
        """Refuse a row, or a segment of a packed one, that is so long that its length changes the frequencies.

        Raises:
            ReGateError: on the rank that asks.
        """
        if self._most is not None and longest > self._most:
            raise refuse(
                "RoPE scaling",
                given=f"rows of {longest} positions; from {self._most} on frequencies change by length",
                allowed=f"rows of up to {self._most} positions",
                change="the greatest length of rows, or rope_scaling to a fixed one",
            )

    def rotary(self, given: Tensor | None, plan: ShardedPlan) -> Tensor | None:
        """What the layers get as ``rotary_pos_emb``; [k, B, 1, D], or None where nothing is rotated.

        Args:
            given: what the model passes to its decoder.
            plan: of the microbatch, on the device of the hidden states.

        Raises:
            ReGateError: see :meth:`check_length`.
        """
        if not plan.is_packed:
            self.check_length(plan.dense_length)
        if given is None and not self.handed:
            return None
        if self.is_short_given:
            return _own_part(given, plan)
        if self.is_dense_given:
            return plan.tokens.to_short(given.expand(-1, len(plan.keep_idx_BK), -1, -1))
        table_kB1D = self._table(plan.dense_length, plan.place_Bk)[plan.place_Bk.t()][:, :, None]
        return self.scales[0].widened(table_kB1D, plan) if self.scales else table_kB1D

    def _table(self, dense_length: int, like: Tensor) -> Tensor:
        """Frequencies of every dense position, [S, D]; kept for one length."""
        if dense_length not in self._tables:
            rotary = self.handed[0].rotary if self.handed else self.model.rotary_pos_emb
            table_S11D, _ = _emb_and_mscale(rotary, dense_length)
            self._tables = {dense_length: table_S11D[:, 0, 0].to(like.device)}
        return self._tables[dense_length]


def layers_ahead(model: Any) -> list[Any]:
    """The transformer layers of a chunk that predict ahead, one per depth or one for all."""
    ahead = getattr(model, "mtp", None)
    return [] if ahead is None else [one.mtp_model_layer for one in ahead.layers]


class HandedRotary:
    """Multi-latent attention that rotates by the frequencies in its ``rotary_pos_emb`` argument, where there are any.

    The layer refuses that argument and asks its rotary module instead. Two instance attributes, ``forward`` of the
    attention and of its rotary module, bring one to the other within a single call; without the argument both are the
    framework's. Nothing outlives the call, so a layer that recompute runs again has what it saved.
    """

    def __init__(self, attention: Any) -> None:
        self.attention, self.rotary = attention, attention.rotary_pos_emb
        self._attend, self._rotate = attention.forward, self.rotary.forward
        self._handed_KB1D: Tensor | None = None
        attention.forward, self.rotary.forward = self.attend, self.rotate

    def detach(self) -> None:
        """Give both modules their own forward back."""
        del self.attention.forward, self.rotary.forward

    def attend(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """The attention's forward."""
        self._handed_KB1D = rotary_pos_emb
        try:
            return self._attend(*args, rotary_pos_emb=None, **kwargs)
        finally:
            self._handed_KB1D = None

    def rotate(self, *args: Any, **kwargs: Any) -> Any:
        """The rotary module's forward: frequencies [K, B, 1, D], with yarn's mscale beside them."""
        if self._handed_KB1D is None:
            return self._rotate(*args, **kwargs)
        return self._handed_KB1D if self._mscale is None else (self._handed_KB1D, self._mscale)

    @cached_property
    def _mscale(self) -> float | None:
        return _emb_and_mscale(self.rotary, 1)[1]


def _own_part(given_KB1D: Tensor, plan: ShardedPlan) -> Tensor:
    """What this context rank needs of a table that the model may have left whole (some cut position ids before)."""
    if plan.cp_size == 1 or len(given_KB1D) != plan.keep_idx_BK.shape[1]:
        return given_KB1D
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
    from megatron.core.parallel_state import get_context_parallel_group

    return get_pos_emb_on_this_cp_rank(given_KB1D, 0, get_context_parallel_group())


def _emb_and_mscale(rotary: Any, length: int) -> tuple[Tensor, float | None]:
    """A rotary module's table [S, 1, 1, D] and yarn's attention scale; None for rope, which has none."""
    found = rotary.get_emb(length)
    return found if isinstance(found, tuple) else (found, None)


def _makes_its_table(attention: Any) -> bool:
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    return isinstance(attention, MultiLatentAttention) and hasattr(attention, "rotary_pos_emb")


def _most_positions(model: Any) -> int | None:
    """How long a row may be before mcore-bridge scales the frequencies by its length; None: as long as it likes."""
    scaling = getattr(model, "hf_rope_scaling", None) or {}
    if scaling.get("rope_type") == "dynamic" and scaling.get("alpha") is None:
        return model.config.max_position_embeddings
    if scaling.get("rope_type") == "longrope":
        return model.config.original_max_position_embeddings or model.config.max_position_embeddings
    return None
