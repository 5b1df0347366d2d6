"""The canonical facts of a microbatch, and the interface of the adapters that read them.

Shapes: B rows of the microbatch, S positions of the merged row as the decoder sees it dense, N samples of the
microbatch (B of them, unless rows are packed), X targets of the microbatch, row by row in order of position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from regate_megatron.batches.media import Media
from regate_megatron.method import masks


@dataclass(frozen=True)
class MicrobatchFacts:
    """What the planner needs to know of a microbatch; all on the CPU.

    Attributes:
        is_target_BS: the loss mask the model itself would apply there is positive, and the label is 0 or more; bool
            [B, S].
        is_context_BS: every other position that is not padding; bool [B, S].
        is_visual_BS: context that holds an image embedding, not a token; bool [B, S].
        token_BS: input token ids; any value at visual positions and padding; int64 [B, S].
        position_id_BS: the model's own position id of each token (learned positions and mrope read it); int64 [B, S],
            with mrope [B, S, 3].
        label_BS: the label each position predicts (already shifted); int64 [B, S], meaningful at targets.
        reference_key_N2: 128-bit key of all that a sample's reference losses are made of, int64 [N, 2]: token ids,
            labels of targets, where images lie, and position ids where the model reads them.
        difficulty_key_N2: 128-bit key of that and of the image bytes, int64 [N, 2]; or as the user has it.
        sample_BS: which of the N samples a position belongs to, ascending along the rows, padding included; int64
            [B, S]. None: every row is one sample.
        joins_rows: the samples are rows of one length that only the layout lays one after the other: they are planned
            as rows, as in every other layout.
        media: the images and clips that the visual positions belong to.
        has_visual_loss_BS: visual positions that carry a loss of their own and therefore always run; bool [B, S]. None:
            there are none.
    """

    is_target_BS: Tensor
    is_context_BS: Tensor
    is_visual_BS: Tensor
    token_BS: Tensor
    position_id_BS: Tensor
    label_BS: Tensor
    reference_key_N2: Tensor
    difficulty_key_N2: Tensor
    sample_BS: Tensor | None = None
    joins_rows: bool = False
    media: Media = field(default_factory=Media.none)
    has_visual_loss_BS: Tensor | None = None

    @property
    def dense_length(self) -> int:
        """S, the positions a dense step runs per row."""
        return self.is_target_BS.shape[1]

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.difficulty_key_N2)

    @cached_property
    def num_target_N(self) -> Tensor:
        """Targets of each sample; int64 [N]. What is kept per target is split by it."""
        return self.count_by_sample(self.is_target_BS)

    @cached_property
    def num_targets(self) -> int:
        """X."""
        return int(self.num_target_N.sum())

    @cached_property
    def planned_row_N(self) -> Tensor:
        """The row each sample is planned as a part of; int64 [N], ascending."""
        return torch.arange(self.num_samples) if self.joins_rows else self.row_N

    @property
    def planned_length(self) -> int:
        """The dense length of rows as they are planned."""
        return self.dense_length // self.num_samples if self.joins_rows else self.dense_length

    @cached_property
    def is_read_BS(self) -> Tensor:
        """Up to the last position with a loss of each sample: no loss depends on what follows; bool [B, S]."""
        has_loss_BS = self.is_target_BS
        if self.has_visual_loss_BS is not None:
            has_loss_BS = has_loss_BS | self.has_visual_loss_BS
        return read_by_targets(has_loss_BS, self.sample_BS)

    def count_by_sample(self, where_BS: Tensor) -> Tensor:
        """How many positions are marked in each sample; int64 [N]."""
        if self.sample_BS is None:
            return where_BS.sum(dim=1)
        return torch.bincount(masks.take(self.sample_BS, where_BS), minlength=self.num_samples)

    @cached_property
    def row_N(self) -> Tensor:
        """The row each sample lies in; int64 [N], ascending."""
        if self.sample_BS is None:
            return torch.arange(self.num_samples)
        return torch.arange(len(self.sample_BS)).repeat_interleave(self.sample_BS[:, -1].diff(prepend=_BEFORE))

    @cached_property
    def segment_length_N(self) -> Tensor:
        """Lengths of what context parallelism cuts by itself: the whole row, or the samples of a packed one; int64."""
        if self.sample_BS is None:
            return torch.tensor([self.dense_length])
        return torch.bincount(self.sample_BS.flatten(), minlength=self.num_samples)

    @cached_property
    def start_N(self) -> Tensor:
        """Where in its row each sample starts; int64 [N]."""
        if self.sample_BS is None:
            return torch.zeros(self.num_samples, dtype=torch.int64)
        length_N = self.segment_length_N
        return (length_N.cumsum(0) - length_N) % self.dense_length

    def row_of(self, name: str, sample: int) -> Tensor:
        """A [B, S] attribute cut to one sample, from its first position to its last; [S'] with S' <= S."""
        value_S = getattr(self, name)[self.row_N[sample]]
        if self.sample_BS is None:
            return value_S
        return value_S[self.sample_BS[self.row_N[sample]] == sample]

    def split(self, count: int) -> list[MicrobatchFacts]:
        """The same as ``count`` microbatches of as many adjacent rows each; text, whose rows are one sample each."""
        rows = len(self.is_target_BS) // count
        names = [field.name for field in fields(self) if torch.is_tensor(getattr(self, field.name))]
        columns = [getattr(self, name).split(rows) for name in names]
        return [MicrobatchFacts(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


_BEFORE = torch.tensor([-1])


class BatchAdapter(Protocol):
    """How one framework's batches are read and edited.

    Attributes:
        keys: what a batch must have, for the refusal of one that has not.
    """

    keys: str

    def read(self, batch: dict[str, Any]) -> MicrobatchFacts:
        """The facts of one microbatch. Raises KeyError or ValueError for a batch of another layout."""
        ...

    def read_all(self, batches: Sequence[dict[str, Any]]) -> list[MicrobatchFacts]:
        """The facts of all microbatches of a step."""
        return [self.read(batch) for batch in batches]

    def elide(self, batch: dict[str, Any], is_elided_BS: Tensor) -> dict[str, Any]:
        """A shallow copy of ``batch`` whose loss mask is 0 at elided targets; shapes stay as they are."""
        loss_mask = batch["loss_mask"]
        return dict(batch, loss_mask=without_loss(loss_mask, is_elided_BS.view(loss_mask.shape)))


def targets_of(loss_mask_BS: Tensor, label_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Where a batch has targets, and where it has a loss; bool [B, S] each.

    A label below 0 (−100 by the habit of Hugging Face) is none: there is nothing to predict. Where the loss mask is
    positive all the same, Megatron trains the position in its own way; it is context then, no padding: it runs where
    context runs, its loss counts as ever, and no difficulty, prior or teacher looks at it.
    """
    has_loss_BS = to_cpu(loss_mask_BS) > 0
    return has_loss_BS & (label_BS >= 0), has_loss_BS


def read_by_targets(is_target_BS: Tensor, sample_BS: Tensor | None = None) -> Tensor:
    """Mark the positions up to the last target of each row, or of each sample of packed rows; bool [B, S].

    Under causal attention no loss depends on what follows, nor any gradient: leaving it out changes neither.
    """
    if sample_BS is None:
        return is_target_BS.flip(1).cumsum(dim=1).flip(1) > 0
    position_BS = torch.arange(is_target_BS.shape[1]).expand_as(is_target_BS)
    last_N = torch.full((int(sample_BS.max()) + 1,), -1)
    last_N.scatter_reduce_(0, sample_BS[is_target_BS], position_BS[is_target_BS], "amax")
    return position_BS <= last_N[sample_BS]


def content_keys(rows: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """One 128-bit key per row (xxh3) over its arrays and their lengths, as int64 [B, 2].

    Stable across epochs, ranks, layouts and batch shapes as long as the arrays are.
    """
    keys = bytearray()
    for arrays in rows:
        digest = xxhash.xxh3_128()
        for array in arrays:
            digest.update(array.nbytes.to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array))
        keys += digest.digest()
    return torch.frombuffer(keys, dtype=torch.int64).view(-1, 2)


def unusual_positions(id_X: np.ndarray) -> list[np.ndarray]:
    """What a key says of the position ids of a sample: nothing where they are 0, 1, 2 …, else the ids.

    So a sample has one key alone, padded or packed, as long as its ids count from its own start. Ids that count from
    elsewhere belong in the key of a model with learned positions; mrope is relative, so take the first one off before.

    Args:
        id_X: int64 [X], with mrope [X, 3].
    """
    usual_X = np.arange(len(id_X)).reshape(-1, *[1] * (id_X.ndim - 1))
    return [] if bool((id_X == usual_X).all()) else [id_X]


def key_hex(key_2: Tensor) -> str:
    """A key as 32 hexadecimal digits."""
    return key_2.numpy().tobytes().hex()


def position_ids(batch: dict[str, Any], token_BN: Tensor) -> Tensor:
    """The batch's position ids, or 0, 1, 2 … where it has none; int64 [B, N], those of mrope [B, N, 3]."""
    given = batch.get("position_ids")
    if given is None:
        return torch.arange(token_BN.shape[1]).expand_as(token_BN)
    ids = to_cpu(given).long()
    return ids.permute(1, 2, 0) if ids.dim() == 3 else ids


def without_loss(loss_mask: Tensor, where: Tensor) -> Tensor:
    """``loss_mask`` with 0 at ``where``; pinned if it was, so that its copy to the device stays asynchronous."""
    masked = loss_mask.masked_fill(where.to(loss_mask.device), 0)
    return masked.pin_memory() if loss_mask.is_pinned() else masked


def to_cpu(value: Any) -> Tensor:
    """A batch entry as a CPU tensor (batches of Megatron's data loaders are on the CPU already)."""
    return torch.as_tensor(value).detach().cpu()
