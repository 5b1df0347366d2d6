"""Mixture of experts in a short run: fill counts for nothing.

Fill slots repeat a position and are read by nobody, but a router would count them in its auxiliary losses and in the
token counts that move its expert bias. The block's ``padding_mask`` argument (True is padding) leaves them out. It goes
with every short run, also where no slot is fill: whether it is there decides how the auxiliary losses reduce their
counts, and all ranks must decide alike.

Under sequence parallelism Megatron weighs the auxiliary losses by each rank's own tokens, so there they differ from a
masked full-length step, whose ranks hold other tokens, by as much as fill and elided tokens are spread unevenly.

Shapes: S dense positions, K slots that run, k those of this context rank, B rows, N tokens of a rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from regate_megatron.decoder.exchange import ShardedPlan
from regate_megatron.errors import refuse


class Experts:
    """The routers of one model chunk's decoder, or of its layers that predict ahead."""

    def __init__(self, config: Any, layers: Iterable[Any]) -> None:
        self.config = config
        routers = [getattr(getattr(layer, "mlp", None), "router", None) for layer in layers]
        self.biased = [ExpertCounts(one) for one in routers if getattr(one, "enable_expert_bias", False)]
        self.has_routers = any(one is not None for one in routers)

    def detach(self) -> None:
        """Take every hook off the routers."""
        while self.biased:
            self.biased.pop().detach()

    @property
    def moves_mask(self) -> bool:
        """Whether a mask of the model's own has to travel with the kept positions."""
        return self.has_routers and self.config.context_parallel_size > 1

    def check(self, given: Tensor | None, dense_LBH: Tensor | None) -> None:
        """Refuse what the model passes as ``padding_mask``, in the first forward, dense or not.

        Raises:
            ReGateError: a mask of other positions than this context rank's.
        """
        if given is None or dense_LBH is None or not self.moves_mask:
            return
        if given.shape[1] != len(dense_LBH):
            raise refuse(
                "padding mask",
                given=f"one of {given.shape[1]} positions on a context rank that has {len(dense_LBH)}",
                allowed="this rank's part, as hidden states are cut",
                change="the forward step, or --context-parallel-size to 1",
            )

    def padding(self, given: Tensor | None, plan: ShardedPlan) -> Tensor | None:
        """What the layers get as ``padding_mask``; bool [B, k], under sequence parallelism this rank's slice of k.

        Args:
            given: what the model passes to its decoder: [B, S], or a slice of S where that is sharded (by context and
                sequence parallelism, as hidden states are); or None.
            plan: of the microbatch.
        """
        if not self.has_routers:  # nobody reads it
            return None
        is_fill_Bk = plan.is_fill_Bk
        if given is not None:
            if given.shape[1] * plan.cp_size != plan.dense_length:
                given = _gather(given)
            if plan.cp_size > 1:
                is_padding_Bk = plan.tokens.to_short(given.t().byte()).t().bool()
            else:
                is_padding_Bk = given.bool().gather(1, plan.keep_idx_BK)
            is_fill_Bk = is_fill_Bk | is_padding_Bk
        return _slice(is_fill_Bk) if self.config.sequence_parallel else is_fill_Bk


class ExpertCounts:
    """Token counts of one router without padding.

    Megatron-Core up to 0.19 applies the padding mask [N] to its routing map [N, E] along the experts. The instance
    attribute ``_apply_expert_bias`` applies it along the tokens and hands on a map that needs no mask.
    """

    def __init__(self, router: Any) -> None:
        self.router, self._count = router, router._apply_expert_bias
        router._apply_expert_bias = self.count

    def detach(self) -> None:
        """Give the router its own method back."""
        del self.router._apply_expert_bias

    def count(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert; bool [N, E] and bool [N], True is padding."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        self._count(routing_map)


def _gather(mask: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(mask.t().contiguous().byte()).bool().t()


def _slice(mask_BK: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    return scatter_to_sequence_parallel_region(mask_BK.t().contiguous()).t().contiguous()
