"""Rows that the host's step pads, and may lay end to end, before the model sees them.

Megatron-Bridge's ``qwen3_vl_step`` pads every microbatch to a multiple of its own, or to the sequence length; with
``enable_in_batch_packing`` it then lays its rows end to end, each a segment of that length. The samples are rows still:
they are planned as rows, in whichever way the step lays them.

Shapes: B rows, S positions as the batch has them, L as the model sees them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts

_PADDED_WITH = {"input_ids": 0, "tokens": 0, "labels": -100, "loss_mask": 0, "attention_mask": 0}


@dataclass(frozen=True, kw_only=True)
class PaddedRows(BatchAdapter):
    """An adapter whose rows the step pads.

    Attributes:
        adapter: reads the batches.
        multiple: rows become multiples of it.
        length: they become this long, longer ones are cut; None: the multiple says.
        end_to_end: whether the rows of a microbatch are laid one after the other.
    """

    adapter: BatchAdapter
    multiple: int = 1
    length: int | None = None
    end_to_end: bool = False

    @property
    def keys(self) -> str:
        """See :class:`BatchAdapter`."""
        return self.adapter.keys

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`."""
        rows = {name: (batch[name], value) for name, value in _PADDED_WITH.items() if torch.is_tensor(batch.get(name))}
        rows = {name: given for name, given in rows.items() if given[0].dim() == 2}
        length_S = next(value_BS.shape[1] for value_BS, _ in rows.values())
        length = self.length or math.ceil(length_S / self.multiple) * self.multiple
        padded = {name: pad(value_BS, (0, length - length_S), value=fill) for name, (value_BS, fill) in rows.items()}
        facts = self.adapter.read(dict(batch, position_ids=None, **padded))
        return laid_end_to_end(facts) if self.end_to_end else facts

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`; padding has no loss to take away."""
        rows, length_S = batch["loss_mask"].shape
        is_elided_BL = is_elided_BS.view(rows, -1)[:, :length_S]
        missing = length_S - is_elided_BL.shape[1]
        return self.adapter.elide(batch, pad(is_elided_BL, (0, missing)) if missing > 0 else is_elided_BL)


def laid_end_to_end(facts: MicrobatchFacts) -> MicrobatchFacts:
    """The same rows as the segments of one, planned as rows."""
    rows, length = facts.is_target_BS.shape
    names = [one.name for one in dataclasses.fields(facts) if one.name.endswith("_BS")]
    values = {name: getattr(facts, name) for name in names}
    joined = {name: value.reshape(1, -1, *value.shape[2:]) for name, value in values.items() if value is not None}
    sample_BS = torch.arange(rows).repeat_interleave(length)[None]
    return dataclasses.replace(facts, **joined | {"sample_BS": sample_BS, "joins_rows": True})
