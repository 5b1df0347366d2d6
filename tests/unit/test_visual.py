"""Visual positions as candidates: how many run, told by trying everything; which, told by hand; and what never goes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regate_megatron import ReGateConfig, ReGateError
from regate_megatron.batches import MicrobatchFacts, StepFacts
from regate_megatron.batches.media import Media
from regate_megatron.memory.learned import Learned
from regate_megatron.method.budget import Alignment, align_up
from regate_megatron.method.candidates import Candidates, Sort
from regate_megatron.method.selection import select
from regate_megatron.method.visual_scores import FIRST_FRAME, VISUAL_SCORES, VisualSignals
from regate_megatron.ranks.topology import Topology
from regate_megatron.step.planner import Planner
from regate_megatron.step.sorts import Visual
from regate_megatron.step.step import Step
from tests.unit.ranks import over_ranks

ALONE = Topology(0, 1, True, 0, 1, None, None, None)

# ------------------------------------------------------------------------------------------------------------- how many


@st.composite
def rows_of_both(draw):
    """Per row its samples' targets (scores), and its media (scores, least); few enough to try every set."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        score = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0])
        targets = [draw(st.lists(score, max_size=6))]
        media = [(draw(st.lists(score, max_size=7)), draw(st.integers(0, 3))) for _ in range(draw(st.integers(0, 2)))]
        rows.append((draw(st.integers(0, 3)), targets, media))
    return rows


def _share(ratio: float, count: int, least: int = 0, divisor: int = 1) -> int:
    return max(min(least, count), math.ceil(round(ratio * 100) * count / (100 * divisor)))


def _candidates(rows, p: float, r: float) -> Candidates:
    targets = [(row, scores) for row, (_, own, _) in enumerate(rows) for scores in own]
    media = [(row, scores, least) for row, (_, _, own) in enumerate(rows) for scores, least in own]

    def sort(groups, ratio, least=None):
        return Sort(
            count_G=torch.tensor([len(scores) for _, scores, *_ in groups], dtype=torch.int64),
            row_G=torch.tensor([row for row, *_ in groups], dtype=torch.int64),
            keep_ratio=ratio,
            score_X=torch.tensor([score for _, scores, *_ in groups for score in scores], dtype=torch.float64),
            least_G=least,
        )

    return Candidates(
        always_R=torch.tensor([always for always, _, _ in rows]),
        dense_M=torch.tensor([24] * len(rows)),
        key_M=torch.arange(len(rows)),
        sorts=(sort(targets, p), sort(media, r, torch.tensor([one[2] for one in media], dtype=torch.int64))),
    )


def _best_of_sort(groups, num_keep: int) -> set[tuple[int, int]]:
    """Of all sets of ``num_keep`` that hold every group's floor, the best: higher scores first, ties lower."""
    places = [(group, place) for group, (scores, _) in enumerate(groups) for place in range(len(scores))]
    order = {place: index for index, place in enumerate(places)}
    allowed = [
        chosen
        for chosen in itertools.combinations(places, num_keep)
        if all(sum(group == at for at, _ in chosen) >= floor for group, (_, floor) in enumerate(groups))
    ]
    return set(min(allowed, key=lambda chosen: sorted((-groups[g][0][n], order[g, n]) for g, n in chosen)))


def _oracle(targets, media, p: float, r: float, num_keep: int, of_ask: bool):
    """What a row keeps: of all splits between the sorts the one in which the sort that got furthest is least far on
    its way; then the best set of each sort.
    """
    sorts = [
        [(scores, _share(p, len(scores)), _share(p, len(scores), 0, 2)) for scores in targets],
        [(scores, _share(r, len(scores), least), _share(r, len(scores), least, 2)) for scores, least in media],
    ]

    def way(groups, count: int) -> float:
        ask = sum(group[1] for group in groups)
        first = ask if of_ask else sum(group[2] for group in groups)
        every = sum(len(group[0]) for group in groups)
        if count <= first:
            return 0.0
        return (count - first) / (ask - first) if count <= ask else 1 + (count - ask) / (every - ask)

    low = [sum(group[1 if of_ask else 2] for group in groups) for groups in sorts]
    high = [sum(len(group[0]) for group in groups) for groups in sorts]
    splits = [
        (num_targets, num_keep - num_targets)
        for num_targets in range(low[0], high[0] + 1)
        if low[1] <= num_keep - num_targets <= high[1]
    ]
    split = min(splits, key=lambda one: (max(map(way, sorts, one)), -one[0]))
    first = 1 if of_ask else 2
    return [
        _best_of_sort([(group[0], group[first]) for group in groups], n) for groups, n in zip(sorts, split, strict=True)
    ]


@settings(max_examples=300)  # splits differ only where floors are not half of what is asked
@given(
    rows=rows_of_both(),
    p=st.sampled_from([0.25, 0.5, 1.0]),
    r=st.sampled_from([0.1, 0.25, 0.5]),
    kind=st.sampled_from(["uniform", "balanced", "per-sample"]),
    step=st.sampled_from([1, 2, 4]),
)
def test_rows_keep_what_trying_every_split_and_every_set_finds(rows, p, r, kind, step):
    candidates, alignment = _candidates(rows, p, r), Alignment(1, step)
    (chosen,) = over_ranks(1, lambda _, gather: select(candidates, kind=kind, alignment=alignment, all_gather=gather))
    of_targets, of_media = (iter(part.tolist()) for part in candidates.by_sort(chosen.is_kept_X))
    asked = []
    for length, (always, targets, media) in zip(chosen.length_M.tolist(), rows, strict=True):
        kept = [
            {(g, n) for g, scores in enumerate(targets) for n in range(len(scores)) if next(of_targets)},
            {(g, n) for g, (scores, _) in enumerate(media) for n in range(len(scores)) if next(of_media)},
        ]
        num_keep = sum(map(len, kept))
        assert kept == _oracle(targets, media, p, r, num_keep, kind == "per-sample")
        ask = sum(_share(p, len(scores)) for scores in targets) + sum(_share(r, len(s), least) for s, least in media)
        every = sum(map(len, targets)) + sum(len(scores) for scores, _ in media)
        asked.append(always + ask)
        if kind == "per-sample":
            assert num_keep == ask and length == align_up(max(always + ask, 1), step)
        else:
            assert num_keep == min(every, length - always), "there is no fill while a candidate is left"
    if kind == "uniform":
        floors = [
            always
            + sum(_share(p, len(scores), 0, 2) for scores in targets)
            + sum(_share(r, len(scores), least, 2) for scores, least in media)
            for always, targets, media in rows
        ]
        mean = -(-sum(asked) // len(asked))
        assert set(chosen.length_M.tolist()) == {align_up(max(mean, *floors, 1), step)}


# ------------------------------------------------------------------------------------------------------ what never goes


def _facts(*rows: str, grids: list[tuple[int, int, int]] | None = None, lead: int = 0, pixels=None, joined=False):
    """Rows of c context, t targets, v visual, V visual with a loss, . padding; a run of v is a medium."""
    symbols = [list(row) for row in rows]
    is_visual_BS = torch.tensor([[symbol in "vV" for symbol in row] for row in symbols])
    counts = [
        (row, len(list(run)))
        for row, text in enumerate(symbols)
        for is_visual, run in itertools.groupby(text, key=lambda symbol: symbol in "vV")
        if is_visual
    ]
    where = {name: torch.tensor([[s in letters for s in row] for row in symbols]) for name, letters in
             {"target": "t", "context": "cvV", "loss": "V"}.items()}  # fmt: skip
    key_N2 = torch.tensor([[17 * row + 3, row] for row in range(len(rows))])
    number = torch.arange(len(rows)).repeat_interleave(len(rows[0]))[None]

    def lay(value_BS):
        return value_BS.reshape(1, -1) if joined else value_BS

    zeros = lay(torch.zeros_like(is_visual_BS, dtype=torch.int64))
    return MicrobatchFacts(
        is_target_BS=lay(where["target"]),
        is_context_BS=lay(where["context"]),
        is_visual_BS=lay(is_visual_BS),
        has_visual_loss_BS=lay(where["loss"]),
        token_BS=zeros,
        position_id_BS=zeros,
        label_BS=zeros,
        reference_key_N2=key_N2,
        difficulty_key_N2=key_N2,
        sample_BS=number if joined else None,
        joins_rows=joined,
        media=Media(
            sample_I=torch.tensor([row for row, _ in counts], dtype=torch.int64),
            count_I=torch.tensor([count for _, count in counts], dtype=torch.int64),
            grid_I3=None if grids is None else torch.tensor(grids),
            lead_I=torch.full((len(counts),), lead),
            pixels=pixels,
        ),
    )


def _plan(facts, number=5, **options) -> list[str]:
    """Per row the symbols that ran, . where one did not."""
    step = Step(number, "sparse", elides=True, facts=[facts])
    settings = {"keep_ratio": 1.0, "length_multiple": 1, "budget": "per-sample", "score": "random"}
    planner = Planner(ReGateConfig(**{**settings, **options}), ALONE, 1)
    planner.check(step.whole)
    planner.plan(step)
    assert not step.fallback
    return ["".join("x" if kept else "." for kept in row) for row in step.plan.microbatches[0].kept_mask().tolist()]


@pytest.mark.parametrize("budget", ["per-sample", "uniform", "balanced"])
def test_only_visual_positions_go_where_targets_all_run(budget):
    (kept,) = _plan(_facts("cvvvvvvvvcctttt."), visual_keep_ratio=0.25, budget=budget)
    assert kept[0] == "x" and kept[9:] == "xxxxxx." and kept[1:9].count("x") == 2


def test_each_picture_has_its_own_share():
    (kept,) = _plan(_facts("vvvvvvvvcvvvvctt"), visual_keep_ratio=0.25)
    assert (kept[:8].count("x"), kept[9:13].count("x")) == (2, 1)


def test_a_clip_keeps_at_least_a_frame_and_a_picture_need_not():
    assert _plan(_facts("vvvvvvvvctt", grids=[(4, 1, 2)]), visual_keep_ratio=0.01)[0].count("x") == 2 + 3
    assert _plan(_facts("vvvvvvvvctt", grids=[(1, 4, 2)]), visual_keep_ratio=0.01)[0].count("x") == 1 + 3
    floor = _plan(_facts("vvvvvvvvctt", grids=[(2, 2, 2)]), visual_keep_ratio=0.5, budget="balanced")
    assert floor[0].count("x") == 4 + 3


def test_a_visual_position_with_a_loss_always_runs():
    for number in range(5, 15):
        (kept,) = _plan(_facts("cvvVvtVt"), number, visual_keep_ratio=0.25)
        assert kept[3] == kept[6] == "x" and kept.count("x") == 5 + 1


def test_class_tokens_are_no_part_of_the_picture_and_always_run():
    for number in range(5, 15):
        (kept,) = _plan(_facts("cvvvvvctt", grids=[(1, 2, 2)], lead=1), number, visual_keep_ratio=0.25)
        assert kept[1] == "x" and kept[2:6].count("x") == 1


def test_pictures_that_no_target_reads_go_with_the_rest():
    facts = _facts("vvvvcttvvvvc", "vvvvvvvvvvvv")
    every, read = (_plan(facts, visual_keep_ratio=0.5, context=context) for context in ("all", "read"))
    assert every[0][7:11].count("x") == 2 and every[0][11] == "x" and every[1].count("x") == 6
    assert read[0][:7].count("x") == 2 + 3 and read[0][7:] == "....." and read[1].count("x") == 0


def test_what_follows_the_last_loss_is_read_by_nobody_even_if_a_picture_has_it():
    assert _plan(_facts("ctvVcc"), visual_keep_ratio=0.5, context="read")[0] == "xxxx.."


def test_a_picture_cut_by_the_longest_row_has_a_share_of_what_is_left():
    (kept,) = _plan(_facts("ctttttvvvv", grids=[(1, 4, 4)]), visual_keep_ratio=0.5)  # 4 of 16 fit
    assert kept.count("x") == 6 + 2


@pytest.mark.parametrize("score", ["random", "even"])
def test_rows_that_a_layout_joins_keep_what_they_keep_apart(score):
    rows = ("cvvvvvvvvvctttt.", "vvvvvvvvvccctttt", "cctttt..........")
    grids = [(1, 3, 3), (1, 3, 3)]
    apart, joined = (
        _plan(_facts(*rows, grids=grids, joined=joined), visual_keep_ratio=0.5, visual_score=score, budget="uniform")
        for joined in (False, True)
    )
    assert "".join(apart) == joined[0] and apart[0][1:10].count("x") < 9


def test_a_step_without_pictures_runs_all_that_is_real():
    assert _plan(_facts("cctt..", "cctttt"), visual_keep_ratio=0.25) == ["xxxx..", "xxxxxx"]


@pytest.mark.parametrize("score", ["static", "detail"])
def test_a_rule_that_reads_pixels_is_refused_in_one_line_where_there_are_none(score):
    line = rf"^regate: --regate-visual-score: given {score} for pictures without pixels .*; allowed even.* it to even$"
    for grids in (None, [(1, 2, 2)]):
        with pytest.raises(ReGateError, match=line):
            _plan(_facts("vvvvctt", grids=grids), visual_keep_ratio=0.5, visual_score=score)
    assert _plan(_facts("cctt"), visual_keep_ratio=0.5, visual_score=score) == ["xxxx"]


def test_pictures_in_cells_that_nobody_knows_are_ranked_by_chance_and_those_beside_them_evenly():
    unknown, known = _facts("c" + "v" * 9 + "tt"), _facts("cvvvvvvvvvtt", grids=[(1, 3, 3)])

    def kept(score: str, *facts: MicrobatchFacts) -> list[list[bool]]:
        step = Step(5, "sparse", elides=True, facts=list(facts))
        settings = {"keep_ratio": 1.0, "visual_keep_ratio": 0.5, "budget": "per-sample", "length_multiple": 1}
        Planner(ReGateConfig(**settings, visual_score=score), ALONE, 1).plan(step)
        return [one.kept_mask().tolist() for one in step.plan.microbatches]

    by_chance, spread = kept("random", unknown, known), kept("even", unknown, known)
    assert by_chance[0] == spread[0] and by_chance[1] != spread[1] == kept("even", known)[0]


# ---------------------------------------------------------------------------------------------------------------- which


def _signals(grids, pixels=(), step=5, seed=1) -> VisualSignals:
    """Every place of every grid is a candidate."""
    from regate_megatron.method.chance import uniform_in_0_1

    grid_I3 = np.array(grids)
    count_I = grid_I3.prod(axis=1)
    medium_X = np.arange(len(grids)).repeat(count_I)
    place_X = np.concatenate([np.arange(count) for count in count_I])
    key_I2 = torch.tensor([[7 + 5 * medium, medium] for medium in range(len(grids))])
    return VisualSignals(
        gradient_X=np.full(len(medium_X), np.nan),
        medium_X=medium_X,
        place_X=place_X,
        grid_I3=grid_I3,
        pixels=lambda medium: np.asarray(pixels[medium], np.float32),
        keys=lambda: (key_I2[torch.from_numpy(medium_X)], torch.from_numpy(place_X)),
        chance=lambda: uniform_in_0_1(key_I2, torch.zeros(len(grids), dtype=torch.int64), seed=seed, step=step).numpy(),
        seed=seed,
        step=step,
    )


def test_every_rule_gives_finite_scores_in_the_order_of_candidates_and_alone_as_among_others():
    pixels = [np.random.default_rng(medium).normal(size=(12, 5)) for medium in range(2)]
    both, second = _signals([(1, 3, 4), (3, 2, 2)], pixels), _signals([(3, 2, 2)], pixels[1:])
    for name, row in VISUAL_SCORES.items():
        score_X = row.of(both)
        assert score_X.dtype == np.float64 and len(score_X) == 24 and np.isfinite(score_X).all()
        if name == "detail":
            assert score_X[12:].tolist() == row.of(second).tolist()


def _uneven(chosen_hw: np.ndarray, block: int) -> float:
    """Variance of how many of the chosen lie in each block of the picture."""
    height, width = chosen_hw.shape
    count = chosen_hw.reshape(height // block, block, width // block, block).sum(axis=(1, 3))
    return float(count.var())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_even_spreads_any_number_of_positions_better_than_chance(share):
    side = 24
    found = {}
    for name in ("even", "random"):
        found[name] = 0.0
        for step in range(20):
            score = VISUAL_SCORES[name].of(_signals([(1, side, side)], step=step))
            best = np.argsort(-score, kind="stable")[: round(share * side * side)]
            chosen = np.zeros(side * side)
            chosen[best] = 1
            found[name] += _uneven(chosen.reshape(side, side), 6) / 20
    assert found["even"] < found["random"] / 3


def test_even_gives_every_place_the_same_chance_over_steps():
    times = np.zeros(64)
    for step in range(400):
        score = VISUAL_SCORES["even"].of(_signals([(1, 8, 8)], step=step))
        times[np.argsort(-score, kind="stable")[:16]] += 1
    assert times.sum() == 400 * 16 and times.min() > 60 and times.max() < 140  # 100 on average


def test_even_spreads_a_clip_over_frames_too():
    score = VISUAL_SCORES["even"].of(_signals([(16, 8, 8)]))
    best = np.argsort(-score, kind="stable")[: 16 * 8]
    per_frame = np.bincount(best // 64, minlength=16)
    assert per_frame.min() >= 4 and per_frame.max() <= 12


def test_static_is_what_changed_since_the_frame_before_and_the_first_frame_comes_first():
    pixels = [[[1, 0], [1, 1]], [[1, 0], [2, 2]], [[0, 3], [-1, -1]]]  # three frames of two places
    score = VISUAL_SCORES["static"].of(_signals([(3, 1, 2)], [np.reshape(pixels, (6, 2))]))
    assert score.tolist() == pytest.approx([FIRST_FRAME, FIRST_FRAME, 0, 0, 1, 2], abs=1e-12)
    black = VISUAL_SCORES["static"].of(_signals([(2, 1, 2)], [[[0, 0], [0, 0], [0, 0], [1, 0]]]))
    assert black.tolist() == [FIRST_FRAME, FIRST_FRAME, 0, 1]
    still = np.random.default_rng(3).uniform(size=(1, 50, 7)).repeat(2, axis=0).reshape(100, 7)
    assert set(VISUAL_SCORES["static"].of(_signals([(2, 5, 10)], [still]))[50:]) == {0.0}, "rounding is no change"


def test_static_keeps_the_whole_first_frame_and_then_what_moves():
    rng = np.random.default_rng(0)
    frame = rng.normal(size=(6, 8))
    clip = np.stack([frame] * 4)
    clip[2, 4] = rng.normal(size=8)  # shows up, and goes again
    facts = _facts("v" * 24 + "ct", grids=[(4, 2, 3)], pixels=lambda _: clip.reshape(24, 8))
    (kept,) = _plan(facts, visual_keep_ratio=8 / 24, visual_score="static")
    assert [place for place in range(24) if kept[place] == "x"] == [0, 1, 2, 3, 4, 5, 16, 22]


def test_static_of_a_picture_is_even_beside_a_clip_or_not():
    pixels = [np.ones((16, 2)), np.ones((8, 2))]
    mixed, alone = _signals([(1, 4, 4), (2, 2, 2)], pixels), _signals([(1, 4, 4)], pixels)
    even = VISUAL_SCORES["even"].of(alone).tolist()
    assert VISUAL_SCORES["static"].of(mixed)[:16].tolist() == VISUAL_SCORES["static"].of(alone).tolist() == even


def test_detail_prefers_places_whose_pixels_differ():
    score = VISUAL_SCORES["detail"].of(_signals([(1, 1, 3)], [[[5, 5], [1, 3], [0, 8]]]))
    assert score.tolist() == [0, 1, 4]
    flat = VISUAL_SCORES["detail"].of(_signals([(1, 1, 2)], [np.repeat([[0.123], [1e4 / 3]], 64, axis=1)]))
    assert flat.tolist() == [0, 0], "rounding is no detail"


def test_gradient_prefers_what_the_loss_depended_on_and_spreads_over_new_samples_evenly():
    seen = dataclasses.replace(_signals([(1, 2, 2)]), gradient_X=np.array([0.5, 2.0, 1.25, 0.25]))
    assert VISUAL_SCORES["gradient"].of(seen).tolist() == [0.5, 2.0, 1.25, 0.25]
    new = _signals([(1, 4, 4)])
    assert VISUAL_SCORES["gradient"].of(new).tolist() == (2 * VISUAL_SCORES["even"].of(new)).tolist()


def test_what_gradients_taught_is_relative_to_a_samples_mean_and_averaged_as_difficulty_is():
    facts = StepFacts([_facts("vvvvct", "cvvvct", "ccccct", grids=[(1, 2, 2), (1, 1, 3)])])
    learned = Learned(0.75, ALONE, 1e9)
    visual = Visual(ReGateConfig(visual_keep_ratio=0.5, visual_score="gradient"), learned)
    count_N = torch.tensor([4, 3, 0])
    norms = torch.tensor([[1, 2, 3, 2, 9, 9], [9, 0, 0, 0, 9, 9], [9] * 6], dtype=torch.float32)
    visual.learn(facts, norms.reshape(-1), 1)
    first = [0.5, 1.0, 1.5, 1.0]
    assert learned.look_up_gradients(facts.key_N2, count_N, 2)[:4].tolist() == first
    assert learned.look_up_gradients(facts.key_N2, count_N, 2)[4:].isnan().all(), "no gradient came there at all"
    visual.learn(facts, 1000 * norms.flip(1).roll(-2, 1).reshape(-1), 2)  # a loss scaled otherwise
    again = learned.look_up_gradients(facts.key_N2, count_N, 3)[:4].tolist()
    assert again == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(first, first[::-1], strict=True)], rel=1e-3)


def test_gradients_and_difficulty_of_a_sample_do_not_mix_and_are_saved_together():
    learned, key_N2, count_N = Learned(0.9, ALONE, 1e9), torch.tensor([[5, 6]]), torch.tensor([3])
    losses, norms = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    learned.take_in(key_N2, count_N, losses, torch.tensor([1, 2, 3]), step=1, is_dense=True)
    learned.take_in_gradients(key_N2, count_N, norms, 1)
    again = Learned(0.9, ALONE, 1e9)
    again.adopt(learned.difficulty.records, learned.prior)
    for one in (learned, again):
        assert one.look_up(key_N2, count_N, torch.tensor([1, 2, 3]), 2)[0].tolist() == losses.tolist()
        assert one.look_up_gradients(key_N2, count_N, 2).tolist() == norms.tolist()


def test_random_visual_scores_change_with_step_and_key_and_not_with_neighbours():
    facts = _facts("cvvvvvvvvvct", "vvvvvvvvvcct")
    alone = _facts("cvvvvvvvvvct")
    visual = Visual(ReGateConfig(visual_keep_ratio=0.5), Learned(0.9, ALONE, 1e9))

    def score(number, *facts):
        return visual.score(Step(number, "sparse", elides=True, facts=list(facts)))

    score_X = score(5, facts)
    assert torch.equal(score_X[:9], score(5, alone))
    assert not torch.equal(score_X, score(6, facts))
    assert torch.equal(score(5, alone, facts), torch.cat([score_X[:9], score_X]))
    assert len(set(score_X.tolist())) == 18
