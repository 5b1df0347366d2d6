"""Whether elision is worth it: what it saves of the decoder's work, and what the teacher costs. Pure.

Work is counted in multiplications of a forward pass: per position of a layer its weights, per squared length
attention's scores and sums over a causal half, per position that reaches the LM head its vocabulary. A backward pass is
twice a forward pass, so the teacher, which has none, costs a third of what it would as a student. A vision tower, the
optimizer and communication are not in it: they run as before and make every gain smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

_LITTLE = 1.03  # times as fast: less is not worth a teacher and a setting


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model in numbers.

    Attributes:
        layers, dense_layers: all of them, and those that see every position in sparse steps too.
        hidden, ffn: widths; of a mixture of experts what runs per position.
        kv: width of keys, and of values.
        vocabulary: rows of the LM head.
        gated: whether the MLP has a gate, and so three matrices.
    """

    layers: int
    dense_layers: int
    hidden: int
    ffn: int
    kv: int
    vocabulary: int
    gated: bool = True

    def layer(self, rows: Rows) -> float:
        """Work of one layer."""
        weights = 2 * self.hidden * (self.hidden + self.kv) + (3 if self.gated else 2) * self.hidden * self.ffn
        return weights * rows.positions + self.hidden * rows.squares

    def whole(self, rows: Rows) -> float:
        """Work of all layers and the LM head."""
        return self.layers * self.layer(rows) + self.hidden * self.vocabulary * rows.positions

    def shortened(self, short: Rows) -> float:
        """Work of what sees shortened rows: all but the dense layers."""
        return self.whole(short) - self.dense_layers * self.layer(short)


@dataclass(frozen=True)
class Rows:
    """Rows, as far as work goes: the sum of their lengths, and of the squares of these (of segments, where packed)."""

    positions: float
    squares: float


@dataclass(frozen=True)
class Outlook:
    """What to expect, as shares of a dense step's work on its slowest rank.

    Attributes:
        step: a sparse step.
        teacher: the teacher, where it has seen none of a step's samples; 0 without one.
        sparse: share of the steps of a cycle that are sparse.
        taught: share of the steps of a cycle in which the teacher is asked.
    """

    step: float
    teacher: float
    sparse: float
    taught: float

    @property
    def cycle(self) -> float:
        """The mean step of a cycle, all reference losses known."""
        return 1 - self.sparse * (1 - self.step)

    @property
    def speedup(self) -> float:
        """How many times as fast, all reference losses known."""
        return 1 / self.cycle

    @property
    def speedup_if_new(self) -> float:
        """The same where every sample is new to the teacher."""
        return 1 / (self.cycle + self.taught * self.teacher)

    def words(self) -> str:
        """All of it, and what to make of it."""
        text = (
            f"a sparse step is {self.step:.1%} of a dense one's decoder work on the slowest rank, a cycle"
            f" {self.cycle:.1%}: {self.speedup:.2f} times as fast"
        )
        if self.teacher:
            text += (
                f"; the teacher costs {self.teacher:.1%} of a dense step for samples it has not seen"
                f" ({self.speedup_if_new:.2f} times as fast if all are new)"
            )
        return f"{text}: {self.verdict()}"

    def verdict(self) -> str:
        """In a few words."""
        if self.speedup < _LITTLE:
            return "hardly worth it"
        if self.speedup_if_new < _LITTLE:
            return "worth it where samples come again, or with --regate-reference-cache filled before"
        return "worth it"


def outlook(
    decoder: Decoder,
    *,
    dense: Rows,
    short: Rows,
    text: Rows | None,
    imbalance: float = 1.0,
    sparse: float,
    taught: float,
) -> Outlook:
    """What to expect of rows like these.

    Args:
        dense, short: the rows of all ranks, whole and as a sparse step runs them.
        text: what the teacher reads of them; None without a teacher.
        imbalance: how far the slowest rank is above the mean in positions of a sparse step, over how far it is in a
            dense one.
        sparse, taught: see :class:`Outlook`.
    """
    whole = decoder.whole(dense)
    return Outlook(
        step=(decoder.dense_layers * decoder.layer(dense) + imbalance * decoder.shortened(short)) / whole,
        teacher=decoder.whole(text) / 3 / whole if text is not None else 0.0,
        sparse=sparse,
        taught=taught,
    )
