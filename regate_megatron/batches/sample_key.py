"""What finds a sample's difficulty again: its content, its text alone, or an id of the batch's own.

By content a picture that is augmented, or a window cut anew, is another sample every time, and the score falls back on
the prior. The losses of the same answer hardly depend on a change of brightness, so a user may say what is one sample:

- ``text``: token ids and labels up to the last target, visual positions left out. Two samples that ask the same of
  different pictures share their difficulty.
- the name of a key of the batch (``sample_id``, ``__key__`` …) with one id per row, a number, a text or bytes. The
  labels of its targets count too, since difficulty is kept by target.

Reference losses stay with the content that the teacher reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_megatron.batches.facts import BatchAdapter, MicrobatchFacts, content_keys

BY_CONTENT, BY_TEXT = "content", "text"


@dataclass(frozen=True)
class NamedSamples(BatchAdapter):
    """An adapter whose difficulty keys are the user's.

    Attributes:
        adapter: reads the batches.
        key: :data:`BY_TEXT`, or the name of the batch's key.
    """

    adapter: BatchAdapter
    key: str

    @property
    def keys(self) -> str:
        """See :class:`BatchAdapter`."""
        return self.adapter.keys if self.key == BY_TEXT else f"{self.adapter.keys}, {self.key}"

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """See :meth:`BatchAdapter.read`.

        Raises:
            ValueError: the batch has no such key, or not one id for each sample.
        """
        return self._named(batch, self.adapter.read(batch))

    def read_all(self, batches: Sequence[dict[str, Any]]) -> list[MicrobatchFacts]:
        """See :meth:`BatchAdapter.read_all`; raises as :meth:`read` does."""
        return [self._named(*pair) for pair in zip(batches, self.adapter.read_all(batches), strict=True)]

    def _named(self, batch: dict[str, Any], facts: MicrobatchFacts) -> MicrobatchFacts:
        numbers = range(facts.num_samples)
        if self.key == BY_TEXT:
            return dataclasses.replace(facts, difficulty_key_N2=content_keys([_text(facts, one) for one in numbers]))
        ids = _ids(batch, self.key, facts.num_samples)
        rows = [[np.frombuffer(ids[one], np.uint8), *_labels(facts, one)] for one in numbers]
        return dataclasses.replace(facts, difficulty_key_N2=content_keys(rows))

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """See :meth:`BatchAdapter.elide`."""
        return self.adapter.elide(batch, is_elided_BS)


def _text(facts: MicrobatchFacts, sample: int) -> list[np.ndarray]:
    is_target_S = facts.row_of("is_target_BS", sample)
    reads_S = (facts.row_of("is_context_BS", sample) | is_target_S) & ~facts.row_of("is_visual_BS", sample)
    if bool(is_target_S.any()):
        reads_S = reads_S & (torch.arange(len(reads_S)) <= int(is_target_S.nonzero()[-1]))
    label_S = torch.where(is_target_S, facts.row_of("label_BS", sample), -1)
    return [facts.row_of("token_BS", sample)[reads_S].numpy(), label_S[reads_S].numpy()]


def _labels(facts: MicrobatchFacts, sample: int) -> list[np.ndarray]:
    return [facts.row_of("label_BS", sample)[facts.row_of("is_target_BS", sample)].numpy()]


def _ids(batch: dict[str, Any], key: str, num_samples: int) -> list[bytes]:
    """The id of each sample, as bytes that say its kind too."""
    given = batch.get(key)
    if given is None:
        raise ValueError(f"a batch without the key {key!r}, which --regate-sample-key names (it has {sorted(batch)})")
    given = given.tolist() if torch.is_tensor(given) or isinstance(given, np.ndarray) else list(given)
    if len(given) != num_samples:
        raise ValueError(f"{len(given)} ids in {key!r} for {num_samples} samples")
    return [repr(one).encode() for one in given]
