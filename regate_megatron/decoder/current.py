"""The microbatch whose forward runs now.

Set for the duration of one forward step, and read only where that forward enters the decoder or the loss. Recomputed
layers never look here (microbatch k runs again while k+m is current): what they need is in the arguments they saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from regate_megatron.decoder.exchange import ShardedPlan

Observer = Callable[[Tensor], None]
Watcher = Callable[[Tensor], None]


class CurrentMicrobatch:
    """Holds the plan of the forward in progress, and who wants its per-token losses and its gradients.

    Attributes:
        plan: None outside a step of ours, and in dense steps.
        observe: called with the detached per-token losses [B, S], or None.
        watch: called with the norm of the gradient at every position where a row would be shortened, float32 [L, B]:
            with zeros in the forward of a dense step, with what there is in its backward; or None.
    """

    def __init__(self) -> None:
        self.plan: ShardedPlan | None = None
        self.observe: Observer | None = None
        self.watch: Watcher | None = None

    @contextmanager
    def running(
        self, plan: ShardedPlan | None, observe: Observer | None, watch: Watcher | None = None
    ) -> Iterator[None]:
        """Make ``plan`` current for one forward step; restored also when the step raises."""
        before = (self.plan, self.observe, self.watch)
        self.plan, self.observe, self.watch = plan, observe, watch
        try:
            yield
        finally:
            self.plan, self.observe, self.watch = before
