"""Multi-token prediction of the full-length oracle, from what it should be: no rolls, and kept positions by a mask.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper


def logged_ahead() -> dict[str, torch.Tensor]:
    """What Megatron has logged since it was forgotten: sums over microbatches, per depth."""
    tracker = MTPLossLoggingHelper.tracker
    loss_D = tracker.get("loss_values", tracker.get("values"))  # before core 0.19
    found = {} if loss_D is None else {"losses ahead": loss_D.clone()}
    return found | ({"counts ahead": tracker["total_values"].clone()} if "total_values" in tracker else {})


def forget_ahead() -> None:
    """As Megatron's training loop does after each step."""
    MTPLossLoggingHelper.tracker.clear()


@contextmanager
def ahead_at(kept_BS: torch.Tensor, segment_S: torch.Tensor, logged: dict[str, torch.Tensor]):
    """Depth d has a loss where i is kept and the batch has one at i + d in its segment; ``logged`` gets their means."""
    length = kept_BS.shape[1]

    def process(*, hidden_states, labels, loss_mask, output_layer, config, **given):
        main, *ahead = hidden_states.chunk(1 + config.mtp_num_layers)
        num_main = labels.numel() if loss_mask is None else (loss_mask * kept_BS).sum()
        loss_mask = torch.ones_like(labels) if loss_mask is None else loss_mask
        num_main = num_main if config.calculate_per_token_loss else 1
        for index, hidden in enumerate(ahead):
            logits, _ = output_layer(hidden, weight=given["output_weight"], runtime_gather_output=None)
            label_BS, mask_BS, there_S = torch.zeros_like(labels), torch.zeros_like(loss_mask), -torch.ones(length)
            here, there = slice(length - 1 - index), slice(1 + index, length)
            label_BS[:, here], mask_BS[:, here], there_S[here] = labels[:, there], loss_mask[:, there], segment_S[there]
            mask_BS = mask_BS * kept_BS * (there_S == segment_S)
            mean_BS = given["compute_language_model_loss"](label_BS, logits) * mask_BS / mask_BS.sum().clamp_min(1)
            own = {"losses ahead": mean_BS.sum().detach()}
            if hasattr(MTPLossLoggingHelper, "save_metrics_to_tracker"):  # core 0.19 on
                own["counts ahead"] = (mask_BS > 0).sum()
            for name, value in own.items():
                logged.setdefault(name, torch.zeros(len(ahead)))[index] += value
            weight = config.mtp_loss_scaling_factor / config.mtp_num_layers
            main = MTPLossAutoScaler.apply(main, weight * num_main * mean_BS)
        return main

    with patch.object(gpt_model, "process_mtp_loss", process):
        yield
