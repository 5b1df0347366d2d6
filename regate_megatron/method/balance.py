"""``balanced``: every data-parallel rank runs the same total of positions, filled with its own best candidates. Pure.

No sample moves between ranks; microbatches differ in length. Two decisions, the first common to all ranks:

**The common total** (:func:`common_total`). A rank can run any total from ``low`` (every row at its floor, lengths
aligned) to ``high`` (every candidate kept). Aim at the mean ask over ranks; move away from it, as little as possible,
only where that brings max/mean to 1.02 or less: up to the largest ``low``, which costs no time as that rank runs so
long anyway, or down to it. Where nothing does, because contexts differ by more than candidates make up for, the total
is the larger of the mean ask and the largest ``low``. A rank that cannot run the total runs its nearest.

**The lengths within a rank** (:func:`spread_total`). Every microbatch starts at its ``low`` length; the rest of the
total is handed out in steps of the alignment. A step of a microbatch is worth the next best candidates of its rows.
As many candidates as the total allows are kept (no fill while there are any left), then those of the largest sum of
worth: scores; with several sorts, which cannot be compared, how evenly rows are filled. *Greedy is exact* where all
steps cost alike: next best means that the steps of one microbatch never gain in worth, so taking the most worthy steps
of all takes a prefix of each microbatch's; and a set that leaves a more worthy step out for a less worthy one can be
improved by swapping the two. Steps differ in cost only where a dense length is no multiple of the step, or where dense
lengths of microbatches differ: there the worth per position decides, and less than one step remains unused.

Ties go to the earlier step, so that equal rows grow alike, then to the lower content key, then to the earlier
microbatch.

Shapes: R rows, M microbatches of R/M rows, X candidates of the rank, D data-parallel ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_megatron.method.budget import Alignment, AllGather, align_up
from regate_megatron.method.candidates import Candidates

TOLERANCE = (102, 100)
"""max/mean that counts as balanced, as a ratio of integers."""

_LARGE = 1e290  # sums of a million such scores stay finite


@dataclass(frozen=True)
class Span:
    """The lengths microbatches can have: from ``low_M`` in steps of ``step_M`` to ``high_M``; int64 [M]."""

    low_M: Tensor
    high_M: Tensor
    step_M: Tensor


def span_of(candidates: Candidates, alignment: Alignment) -> Span:
    """From every row at its floor to every candidate kept, aligned."""
    return Span(
        low_M=alignment.align_each(candidates.longest(candidates.floor_R), candidates.dense_M),
        high_M=alignment.align_each(candidates.longest(candidates.full_R), candidates.dense_M),
        step_M=torch.tensor([alignment.step(dense) for dense in candidates.dense_M.tolist()]),
    )


def agree_on_total(candidates: Candidates, span: Span, all_gather: AllGather) -> tuple[int, float]:
    """This rank's total of positions, and the achievable max/mean; the planners of all data-parallel ranks call this.

    One exchange of four numbers per rank.
    """
    rows = candidates.rows
    own = [
        int(candidates.ask_R.sum()),
        rows * int(span.low_M.sum()),
        rows * int(span.high_M.sum()),
        rows * int(span.step_M.max()),
    ]
    ask_D, low_D, high_D, step_D = all_gather(torch.tensor(own)).unbind(dim=1)
    total, achievable = common_total(-(-int(ask_D.sum()) // len(ask_D)), low_D, high_D, int(step_D.max()))
    return min(max(total, own[1]), own[2]), achievable


def common_total(ask: int, low_D: Tensor, high_D: Tensor, step: int) -> tuple[int, float]:
    """The total that ranks aim at, a multiple of ``step``, and the least max/mean that any totals could have.

    Args:
        ask: mean ask of the ranks.
        low_D, high_D: least and largest total of each rank.
    """

    def run(total: int) -> Tensor:
        return torch.clamp(torch.tensor(total), low_D, high_D)

    def is_balanced(total: int) -> bool:
        run_D = run(total)
        return TOLERANCE[1] * int(run_D.max()) * len(run_D) <= TOLERANCE[0] * int(run_D.sum())

    # max/mean falls until the total is the largest low (the maximum stays, others grow) and never falls after it.
    best_D = run(int(low_D.max()))
    achievable = float(best_D.max() / best_D.double().mean())
    wanted, fairest = align_up(ask, step), align_up(int(low_D.max()), step)
    if is_balanced(wanted):
        return wanted, achievable
    if not is_balanced(fairest):
        return max(wanted, fairest), achievable
    while abs(wanted - fairest) > step:
        middle = fairest + (wanted - fairest) // (2 * step) * step
        wanted, fairest = (wanted, middle) if is_balanced(middle) else (middle, fairest)
    return fairest, achievable


def spread_total(total: int, span: Span, candidates: Candidates, rank_X: Tensor, worth_X: Tensor) -> Tensor:
    """The length of every microbatch, int64 [M], with the rows of a microbatch times their sum not above ``total``.

    Args:
        total: at least the rank's low.
        rank_X: place of each candidate in the order in which its row keeps them, from 0.
        worth_X: what each is worth beside those of other rows, float64.
    """
    rows, key_M = candidates.rows, candidates.key_M
    count_MJ, worth_MJ = _worth_of_steps(span, candidates, rank_X, worth_X)
    num_steps = count_MJ.shape[1]
    edge_MJ = span.low_M[:, None] + span.step_M[:, None] * torch.arange(num_steps + 1)
    cost_MJ = rows * edge_MJ.clamp_max(span.high_M[:, None]).diff(dim=1)
    # The order of steps: by what they are worth, then earlier steps, then lower keys, then earlier microbatches.
    micro_M = key_M.argsort(stable=True)
    micro_Y = micro_M.repeat(num_steps)
    count_Y, worth_Y, cost_Y = (value_MJ[micro_M].t().reshape(-1) for value_MJ in (count_MJ, worth_MJ, cost_MJ))
    order_Y = torch.where(cost_Y > 0)[0]
    for value_Y in (worth_Y, count_Y):
        order_Y = order_Y[(value_Y[order_Y] / cost_Y[order_Y]).argsort(descending=True, stable=True)]
    rest = total - rows * int(span.low_M.sum())
    taken_Y = order_Y[cost_Y[order_Y].cumsum(0) <= rest]
    taken_M = torch.bincount(micro_Y[taken_Y], minlength=len(key_M))
    length_M = torch.minimum(span.low_M + span.step_M * taken_M, span.high_M)
    return _use_the_rest(total, length_M, span, rows, order_Y[len(taken_Y) :], micro_Y)


def _worth_of_steps(span: Span, candidates: Candidates, rank_X: Tensor, worth_X: Tensor) -> tuple[Tensor, Tensor]:
    """Number and summed worth of the candidates that each step of each microbatch adds; int64, float64 [M, J]."""
    num_micro, rows, row_X = len(span.low_M), candidates.rows, candidates.row_X
    num_steps = max(1, int(((span.high_M - span.low_M + span.step_M - 1) // span.step_M).max()))
    room_R = span.low_M.repeat_interleave(rows) - candidates.always_R
    micro_X = row_X // rows
    beyond_X = rank_X - room_R[row_X]  # before 0: runs at the low length
    slot_X = (micro_X * num_steps + beyond_X // span.step_M[micro_X])[beyond_X >= 0]
    worth_X = worth_X.nan_to_num(nan=-_LARGE).clamp(-_LARGE, _LARGE)[beyond_X >= 0]
    count = torch.bincount(slot_X, minlength=num_micro * num_steps)
    worth = torch.bincount(slot_X, weights=worth_X, minlength=num_micro * num_steps)
    return count.view(num_micro, -1), worth.view(num_micro, -1)


def _use_the_rest(total: int, length_M: Tensor, span: Span, rows: int, order_Y: Tensor, micro_Y: Tensor) -> Tensor:
    """Take further steps, in their order, that are short enough for what is left: those up to an odd dense length."""
    rest = total - rows * int(length_M.sum())
    cost_M = rows * torch.minimum(span.step_M, span.high_M - length_M)
    if not bool(((cost_M > 0) & (cost_M <= rest)).any()):
        return length_M
    length_M, closed = length_M.clone(), set()
    for micro in micro_Y[order_Y].tolist():
        cost = rows * min(int(span.step_M[micro]), int(span.high_M[micro] - length_M[micro]))
        if cost > rest or micro in closed:
            closed.add(micro)  # what comes after a step needs that step
            continue
        length_M[micro] += cost // rows
        rest -= cost
        if not rest:
            break
    return length_M
