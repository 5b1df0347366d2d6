"""The loss of a short run: labels at the kept positions, per-token losses back at their dense places.

The script's loss function was built with the dense loss mask (0 at elided targets), so it gets losses of dense shape
with zeros where nothing ran; sums and token counts come out right without it knowing.

Means: an instance attribute ``compute_language_model_loss`` on the language model, the narrowest place where labels
and logits meet.

Shapes: B rows, S dense positions, k slots that run, V local vocabulary; under context parallelism S and k are this
rank's parts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regate_megatron.decoder.compaction import check_length
from regate_megatron.decoder.current import CurrentMicrobatch


class LossHook:
    """Hook on the last chunk of a language model.

    Attributes:
        inner: the model's own loss, of labels and logits of one length.
    """

    def __init__(self, model: Any, current: CurrentMicrobatch) -> None:
        self.model, self.current = model, current
        self.inner = model.compute_language_model_loss
        model.compute_language_model_loss = self.compute

    def detach(self) -> None:
        """Give the model its own loss back."""
        del self.model.compute_language_model_loss

    def describe(self) -> str:
        """One line: what is attached where."""
        return "loss: labels at kept positions, per-token losses at dense places"

    def compute(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token losses [B, S] from labels [B, S] and logits [S or k, B, V]."""
        plan, observe = self.current.plan, self.current.observe
        if plan is None:
            loss_BS = self.inner(labels, logits)
        else:
            check_length("labels", labels.shape[1], plan.dense_length // plan.cp_size)
            label_Bk = plan.tokens.to_short(labels.t()).t().contiguous()
            loss_Bk = self.inner(label_Bk, logits).masked_fill(plan.is_fill_Bk, 0)
            loss_BS = plan.tokens.to_dense(loss_Bk.t()).t().contiguous()  # the script's loss function views it flat
        if observe is not None:
            observe(loss_BS.detach())
        return loss_BS
