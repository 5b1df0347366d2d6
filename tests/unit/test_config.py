"""Settings: what is out of range is refused in one line, and the flags are the ones that users rely on."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import pytest

from regate_megatron import ReGateConfig, ReGateError
from regate_megatron.config import flag
from regate_megatron.config.options import (
    BUDGETS,
    CONTEXTS,
    DENSE_AT,
    DIFFICULTIES,
    FUSIONS,
    PACKED_RATIOS,
    SHARES,
    TEACHER_VISUAL,
)
from regate_megatron.cpu import launch
from regate_megatron.flags import add_arguments, config_of, parse
from regate_megatron.method.recipes import RECIPES
from regate_megatron.method.schedule import phase_of
from regate_megatron.method.scores import SCORES
from regate_megatron.method.visual_scores import VISUAL_SCORES
from regate_megatron.support import hints
from regate_megatron.support.setting import Setting

FLAGS = {  # a change here breaks users' scripts
    "--regate": False,
    "--regate-recipe": None,
    "--regate-keep-ratio": 0.5,
    "--regate-keep-ratio-end": None,
    "--regate-keep-ratio-steps": None,
    "--regate-share": "sample",
    "--regate-least-score": None,
    "--regate-visual-keep-ratio": 1.0,
    "--regate-visual-keep-ratio-end": None,
    "--regate-visual-keep-ratio-spread": 0.0,
    "--regate-visual-score": "even",
    "--regate-dense-layers": 1,
    "--regate-dense-last-layers": 0,
    "--regate-warmup-steps": 100,
    "--regate-cycle-steps": 128,
    "--regate-dense-steps": 16,
    "--regate-dense-at": "start",
    "--regate-dense-from": None,
    "--regate-difficulty": "own",
    "--regate-ema-decay": 0.9,
    "--regate-reference-weight": 0.5,
    "--regate-fusion": "sum",
    "--regate-score": "reference",
    "--regate-budget": "dealt",
    "--regate-deal-dense": False,
    "--regate-length-multiple": None,
    "--regate-packed-ratio": "sample",
    "--regate-context": "all",
    "--regate-teacher-load": None,
    "--regate-teacher-visual": "drop",
    "--regate-reference-cache": None,
    "--regate-teacher-offload": False,
    "--regate-sample-key": "content",
    "--regate-difficulty-memory": 4.0,
    "--regate-reset-difficulty": False,
    "--regate-trace": None,
    "--regate-seed": 1234,
}

CHOICES = {
    "fusion": ("sum", "convex"),
    "share": ("sample", "batch"),
    "dense_at": ("start", "random"),
    "difficulty": ("own", "kind"),
    "score": ("regate", "student", "reference", "product", "minimum", "excess", "gain", "random"),
    "budget": ("uniform", "balanced", "per-sample", "dealt"),
    "visual_score": ("random", "even", "static", "detail", "gradient"),
    "packed_ratio": ("row", "sample"),
    "context": ("all", "read"),
    "teacher_visual": ("drop", "pad"),
}

NOT_FINITE = (float("nan"), float("inf"), -float("inf"))

FROM_ZERO = ("dense_layers", "dense_last_layers", "warmup_steps", "dense_steps", "seed")
OUT_OF_RANGE = [
    *(
        (name, value)
        for name in ("keep_ratio", "visual_keep_ratio")
        for value in (0, 0.0, -0.1, 1.0000001, 2, True, "0.5", None, *NOT_FINITE)
    ),
    *(("ema_decay", value) for value in (-0.01, 1, 1.0, 1.5, False, "0.9", None, *NOT_FINITE)),
    *(("reference_weight", value) for value in (-0.01, -1, True, "0.5", None, *NOT_FINITE)),
    *((name, value) for name in FROM_ZERO for value in (-1, 1.0, True, "1")),
    *((name, value) for name in ("cycle_steps", "length_multiple") for value in (0, -1, 1.5, True, "1")),
    ("seed", 2**63),
    *(("least_score", value) for value in ("1", True, *NOT_FINITE)),
    *(("recipe", value) for value in ("", "other", 1, ["paper"])),
    *(("keep_ratio_end", value) for value in (0, 0.0, -0.1, 1.5, True, "0.5", *NOT_FINITE)),
    *(("keep_ratio_steps", value) for value in (0, -1, 1.5, True, "1")),
    *(("dense_from", value) for value in (0, -1, 100, 200.0, True, "200")),
    *((name, value) for name in CHOICES for value in ("", "other", None, 1)),
]


def _is_refusal(message: str, name: str) -> bool:
    words = [message.find(word) for word in (f"{flag(name)}:", "given ", "allowed ", "change ")]
    return message.startswith("regate: ") and "\n" not in message and min(words) > 0 and words == sorted(words)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_in_one_line_that_says_what_to_change(name, value):
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(**{name: value})
    assert _is_refusal(str(refusal.value), name)
    given = "nothing" if value is None else value
    assert f"given {given}; allowed " in str(refusal.value).replace("given;", "given ;")


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratio": 1},
        {"keep_ratio": 1e-6},
        {"keep_ratio": 1.0, "keep_ratio_end": 1e-6, "keep_ratio_steps": 1},
        {"warmup_steps": 3, "dense_from": 4},
        {"ema_decay": 0},
        {"ema_decay": 0.999999},
        {"reference_weight": 0},
        {"reference_weight": 7.5},
        {"reference_weight": 1.0, "fusion": "convex"},
        {"dense_layers": 0, "warmup_steps": 0, "dense_steps": 0},
        {"dense_layers": 0, "warmup_steps": 0, "dense_steps": 0, "score": "random"},
        {"dense_layers": 0, "warmup_steps": 0, "dense_steps": 0, "score": "gain"},
        {"warmup_steps": 0, "dense_steps": 0, "score": "reference"},
        {"warmup_steps": 0, "dense_steps": 1, "cycle_steps": 2, "score": "student"},
        {"warmup_steps": 1, "dense_steps": 0, "score": "student"},
        {"warmup_steps": 0, "dense_steps": 0, "keep_ratio": 1.0, "keep_ratio_end": 0.5, "keep_ratio_steps": 9},
        {"cycle_steps": 1, "dense_steps": 1},
        {"seed": 2**63 - 1},
        {"seed": 0, "length_multiple": 1},
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed(settings):
    config = ReGateConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "student"},
        {"score": "student", "dense_from": 500},
        {"score": "student", "ema_decay": 0},
        {"score": "student", "difficulty": "kind"},
        {"score": "product"},
        {"score": "minimum"},
        {"score": "regate", "reference_weight": 0},
        {"score": "regate", "reference_weight": 0, "fusion": "convex"},
    ],
    ids=str,
)
def test_a_score_that_can_never_learn_anything_is_refused(settings):
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(warmup_steps=0, dense_steps=0, **settings)
    assert _is_refusal(str(refusal.value), "score")
    given = f"given {settings['score']} with --regate-warmup-steps 0 and --regate-dense-steps 0"
    assert given in str(refusal.value) and "change --regate-warmup-steps or " in str(refusal.value)


def test_settings_that_are_off_are_not_judged_by_what_they_would_learn():
    assert not ReGateConfig(enabled=False, score="student", warmup_steps=0, dense_steps=0).enabled


def test_more_dense_steps_than_the_cycle_has_are_refused():
    assert ReGateConfig(cycle_steps=8, dense_steps=8).dense_steps == 8
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(cycle_steps=8, dense_steps=9)
    assert _is_refusal(str(refusal.value), "dense_steps")
    assert "given 9; allowed 0 to 8" in str(refusal.value) and "--regate-cycle-steps" in str(refusal.value)


def test_a_reference_weight_above_one_is_refused_in_the_convex_mix_only():
    assert ReGateConfig(reference_weight=1.5, fusion="sum").reference_weight == 1.5
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(reference_weight=1.5, fusion="convex")
    assert _is_refusal(str(refusal.value), "reference_weight")


@pytest.mark.parametrize(
    ("given", "missing"), [("keep_ratio_end", "keep_ratio_steps"), ("keep_ratio_steps", "keep_ratio_end")]
)
def test_where_the_ratio_goes_and_how_long_it_takes_belong_together(given, missing):
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(**{given: 1})
    assert _is_refusal(str(refusal.value), missing)
    assert f"given nothing; allowed a value beside {flag(given)} 1" in str(refusal.value)


def test_a_ratio_of_one_elides_only_if_it_falls():
    assert not ReGateConfig(keep_ratio=1.0).elides
    assert not ReGateConfig(keep_ratio=1.0, keep_ratio_end=1.0, keep_ratio_steps=9).elides
    assert ReGateConfig(keep_ratio=1.0, keep_ratio_end=0.9, keep_ratio_steps=9).elides
    assert ReGateConfig(keep_ratio=0.9, keep_ratio_end=1.0, keep_ratio_steps=9).elides


def test_visual_positions_alone_need_no_teacher_and_no_difficulty():
    alone = ReGateConfig(keep_ratio=1.0, visual_keep_ratio=0.25)
    assert alone.elides and alone.elides_in(5) and not alone.needs_teacher and not alone.learns
    alone.require_teacher()
    assert dataclasses.replace(alone, teacher_load="student").unused == ["--regate-teacher-load"]
    targets = {"keep_ratio": 1.0, "keep_ratio_end": 0.5, "keep_ratio_steps": 9, "score": "regate"}
    both = ReGateConfig(**targets, visual_keep_ratio=0.25)
    assert both.needs_teacher and both.learns and both.elides_in(0)


@pytest.mark.parametrize(
    "schedule",
    [
        {"cycle_steps": 16, "dense_steps": 16},
        {"warmup_steps": 4, "dense_steps": 2, "dense_from": 6},
        {"keep_ratio": 1.0, "visual_keep_ratio": 1.0},
        {"keep_ratio": 1.0, "keep_ratio_end": 0.5, "keep_ratio_steps": 8, "dense_from": 128, "visual_keep_ratio": 1.0},
    ],
)
def test_a_schedule_in_which_nothing_is_ever_left_out_needs_no_teacher_and_learns_nothing(schedule):
    config = ReGateConfig(**{"visual_keep_ratio": 0.5, "visual_score": "gradient", **schedule})
    assert not any(config.elides_in(n) and phase_of(n, config.schedule) == "sparse" for n in range(1000))
    assert not config.elides and not config.needs_teacher and not config.learns
    config.require_teacher()


def test_one_sparse_step_is_enough_to_need_a_teacher():
    config = ReGateConfig(warmup_steps=4, dense_steps=2, dense_from=7)
    assert phase_of(6, config.schedule) == "sparse" and config.elides and config.needs_teacher


def test_gradients_alone_are_learned_where_visual_positions_are_ranked_by_them():
    config = ReGateConfig(keep_ratio=1.0, visual_keep_ratio=0.5, visual_score="gradient")
    assert config.learns and not config.learns_losses and not config.needs_teacher
    with pytest.raises(ReGateError) as refusal:
        dataclasses.replace(config, warmup_steps=0, dense_steps=0)
    assert _is_refusal(str(refusal.value), "visual_score")


def test_the_visual_ratio_moves_and_is_drawn_by_itself():
    config = ReGateConfig(visual_keep_ratio=0.2, visual_keep_ratio_end=0.4, keep_ratio_steps=256, warmup_steps=0)
    assert [config.visual_keep_ratio_in(n) for n in (0, 127, 128, 256)] == [0.2, 0.2, 0.3, 0.4]
    assert config.keep_ratio_in(500) == 0.5
    drawn = dataclasses.replace(config, visual_keep_ratio_spread=0.5)
    assert len({drawn.visual_keep_ratio_in(n) for n in range(20)}) > 15 and drawn.keep_ratio_in(3) == 0.5
    assert drawn.visual_keep_ratio_in(7) == dataclasses.replace(drawn).visual_keep_ratio_in(7)
    assert drawn.visual_keep_ratio_in(7) != dataclasses.replace(drawn, seed=5).visual_keep_ratio_in(7)


def test_nothing_is_left_out_where_both_ratios_are_one():
    config = ReGateConfig(keep_ratio=1.0, visual_keep_ratio=1.0)
    assert not config.elides and not config.elides_in(10**6)


def test_a_cool_down_cannot_begin_in_the_warm_up():
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(warmup_steps=7, dense_from=7)
    assert "given 7; allowed none, or an integer of 8 or more (after the warm-up)" in str(refusal.value)


def test_the_choices_are_the_documented_ones_and_a_refusal_lists_them_all():
    of_code = {
        "visual_score": tuple(VISUAL_SCORES),
        "share": SHARES,
        "dense_at": DENSE_AT,
        "difficulty": DIFFICULTIES,
        "fusion": FUSIONS,
        "score": tuple(SCORES),
        "budget": BUDGETS,
        "teacher_visual": TEACHER_VISUAL,
    }
    assert of_code | {"packed_ratio": PACKED_RATIOS, "context": CONTEXTS} == CHOICES
    for name, choices in CHOICES.items():
        for choice in choices:
            assert getattr(ReGateConfig(**{name: choice}), name) == choice
        with pytest.raises(ReGateError, match=", ".join(choices)):
            ReGateConfig(**{name: "other"})


@pytest.mark.parametrize("score", CHOICES["score"])
def test_a_teacher_is_asked_for_exactly_where_the_score_uses_the_reference_loss(score):
    config = ReGateConfig(score=score)
    uses_reference = score not in ("student", "random")
    assert config.needs_teacher is uses_reference
    dataclasses.replace(config, teacher_load="student").require_teacher()
    if not uses_reference:
        config.require_teacher()
        return
    with pytest.raises(ReGateError) as refusal:
        config.require_teacher()
    assert _is_refusal(str(refusal.value), "teacher_load")
    assert "given nothing;" in str(refusal.value) and f"--regate-score {score}" in str(refusal.value)
    assert str(refusal.value).endswith(
        "without a teacher: --regate-score student, --regate-score random or --regate-recipe pictures (rows that are "
        "mostly pictures)"
    )
    with pytest.raises(ReGateError, match=r" or --regate-keep-ratio 1 \(visual positions alone go\)$"):
        dataclasses.replace(config, visual_keep_ratio=0.25).require_teacher()


def test_what_a_score_without_teacher_does_not_use_is_named():
    given = {"teacher_load": "student", "reference_cache": "cache"}
    assert ReGateConfig(score="student", **given).unused == ["--regate-teacher-load", "--regate-reference-cache"]
    assert ReGateConfig(score="regate", **given).unused == [] == ReGateConfig(score="random").unused


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"reference_weight": 2.0}, ["--regate-reference-weight"]),  # that of the score that is no default any more
        ({"fusion": "convex", "ema_decay": 0.5}, ["--regate-fusion", "--regate-ema-decay"]),
        ({"difficulty": "kind", "score": "random"}, ["--regate-difficulty"]),
        ({"reference_weight": 2.0, "fusion": "sum", "difficulty": "kind", "score": "regate"}, []),
        ({"difficulty": "kind", "ema_decay": 0.5, "score": "gain"}, []),
        ({"ema_decay": 0.5, "visual_keep_ratio": 0.5, "visual_score": "gradient"}, []),
        ({"recipe": "paper", "score": "random"}, []),
        ({"recipe": "paper", "visual_score": "even"}, ["--regate-visual-score"]),
        ({"visual_score": "random"}, ["--regate-visual-score"]),
        ({"visual_score": "random", "visual_keep_ratio": 0.5}, []),
        ({"visual_keep_ratio_spread": 0.5}, ["--regate-visual-keep-ratio-spread"]),
    ],
)
def test_what_nothing_reads_is_named(settings, idle):
    assert ReGateConfig(**settings).idle == idle


@pytest.mark.parametrize(
    ("name", "change"),
    [("keepratio", "it to keep_ratio"), ("regate_budget", "it to budget"), ("foo", "the spelling")],
)
def test_a_name_that_is_no_setting_is_refused_with_the_nearest(name, change):
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(**{name: 0.5})
    assert str(refusal.value).startswith(f"regate: ReGateConfig: given {name}=…; allowed enabled, ")
    assert str(refusal.value).endswith(f"; change {change}")


def test_a_ratio_in_percent_or_as_text_is_told_what_it_is_as_a_number():
    for value, change in ((25, "it to 0.25, if 25 % was meant"), ("0.5", "it to a number, such as 0.5, not text")):
        with pytest.raises(ReGateError) as refusal:
            ReGateConfig(keep_ratio=value)
        assert str(refusal.value).endswith(f"; change {change}")


def test_settings_cannot_be_changed_once_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReGateConfig().keep_ratio = 2.0


def test_the_flags_and_their_defaults_are_frozen():
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    assert {action.option_strings[0]: action.default for action in parser._actions} == FLAGS
    assert all(len(action.option_strings) == 1 for action in parser._actions)


def test_the_help_names_every_flag_and_its_default():
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    for name, default in FLAGS.items():
        assert name in text
        assert default is False or f"(default: {'none' if default is None else default})" in text


def test_without_the_flag_there_is_no_config():
    assert parse([]) is None
    assert parse(["--regate-keep-ratio", "0.25", "--lr", "1"]) is None
    assert config_of(argparse.Namespace()) is None


def test_the_bare_flag_gives_the_defaults():
    assert parse(["--regate"]) == ReGateConfig()


def test_flags_give_the_config_they_spell():
    words = {
        "keep_ratio": 0.25,
        "keep_ratio_end": 0.75,
        "keep_ratio_steps": 1000,
        "share": "batch",
        "least_score": -0.5,
        "visual_keep_ratio": 0.125,
        "visual_keep_ratio_end": 0.375,
        "visual_keep_ratio_spread": 0.5,
        "visual_score": "static",
        "dense_layers": 0,
        "dense_last_layers": 2,
        "warmup_steps": 3,
        "cycle_steps": 9,
        "dense_steps": 2,
        "dense_at": "random",
        "dense_from": 2000,
        "difficulty": "kind",
        "ema_decay": 0.5,
        "reference_weight": 0.75,
        "fusion": "convex",
        "score": "excess",
        "budget": "per-sample",
        "length_multiple": 64,
        "packed_ratio": "row",
        "context": "read",
        "teacher_load": "some dir/with space",
        "teacher_visual": "pad",
        "reference_cache": "cache",
        "trace": "trace",
        "seed": 7,
    }
    expected = ReGateConfig(**words)
    spaced = [word for name, value in words.items() for word in (flag(name), str(value))]
    joined = [f"{flag(name)}={value}" for name, value in words.items()]
    assert parse(["--regate", *spaced]) == parse([*joined, "--regate"]) == expected
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--regate", *spaced])
    assert config_of(args) == expected


def test_dense_steps_are_dealt_only_where_sparse_ones_are():
    assert parse(["--regate", "--regate-deal-dense"]).deal_dense and not parse(["--regate"]).deal_dense
    with pytest.raises(
        ReGateError, match="^regate: --regate-deal-dense: given True; allowed it beside --regate-budget"
    ):
        parse(["--regate", "--regate-deal-dense", "--regate-budget", "uniform"])


def test_flags_of_others_are_left_alone():
    argv = ["--num-layers", "4", "--lr=1e-3", "--bf16", "--regate", "--regate-seed", "5", "positional", "--reg", "x"]
    before = list(argv)
    assert parse(argv) == ReGateConfig(seed=5)
    assert argv == before


@pytest.mark.parametrize("word", ["--regate-keep-ration", "--regate-keep", "--regate-foo=1", "--regatee"])
def test_an_unknown_flag_of_ours_is_refused_even_when_off(word):
    for argv in (["--regate", word], [word]):
        with pytest.raises(ReGateError) as refusal:
            parse(argv)
        message = str(refusal.value)
        assert message.startswith("regate: ") and "\n" not in message
        assert f"given {word}; allowed --regate, " in message and "; change " in message
        assert word != "--regate-keep-ration" or message.endswith("; change it to --regate-keep-ratio")


@pytest.mark.parametrize(
    "argv",
    [["--regate-seed", "x"], ["--regate-keep-ratio", "half"], ["--regate-seed"], ["--regate-dense-steps", "1.5"]],
    ids=" ".join,
)
def test_a_word_of_the_wrong_kind_is_refused_and_does_not_exit(argv):
    with pytest.raises(ReGateError) as refusal:
        parse(["--regate", *argv])
    assert _is_refusal(str(refusal.value), argv[0].removeprefix("--regate-").replace("-", "_"))


def test_a_range_is_checked_on_the_command_line_too():
    with pytest.raises(ReGateError, match=r"^regate: --regate-keep-ratio: given 1.5; allowed .*; change "):
        parse(["--regate", "--regate-keep-ratio", "1.5"])


@pytest.mark.parametrize("name", ["seed", "keep_ratio", "cycle_steps"])
def test_an_integer_beyond_the_floats_is_refused_like_any_other(name):
    with pytest.raises(ReGateError):
        ReGateConfig(**{name: -(10**400)})


def test_a_kind_of_target_has_a_reference_loss_so_that_every_score_of_difficulty_needs_a_teacher():
    needs = {score for score in SCORES if ReGateConfig(score=score, difficulty="kind").needs_teacher}
    assert needs == set(SCORES) - {"random"}
    with pytest.raises(ReGateError, match="without a teacher: --regate-score random or --regate-recipe pictures "):
        ReGateConfig(score="student", difficulty="kind").require_teacher()
    assert ReGateConfig(score="regate", difficulty="kind").by_kind
    assert not ReGateConfig(score="reference", difficulty="kind").by_kind


def test_a_least_score_needs_a_share_of_the_batch():
    assert ReGateConfig(share="batch", least_score=0.5).least_score == 0.5
    with pytest.raises(ReGateError) as refusal:
        ReGateConfig(least_score=0.5)
    assert _is_refusal(str(refusal.value), "least_score") and "change --regate-share to batch" in str(refusal.value)


@pytest.mark.parametrize("budget", CHOICES["budget"])
def test_a_share_of_the_batch_that_moves_nothing_between_samples_is_said(budget):
    model = SimpleNamespace(context_parallel_size=1, num_moe_experts=None)
    setting = Setting([SimpleNamespace(config=model)], ReGateConfig(budget=budget))
    assert hints(setting) == []
    setting = dataclasses.replace(setting, config=dataclasses.replace(setting.config, share="batch"))
    said = hints(setting)
    assert len(said) == (budget in ("uniform", "balanced")) and all(budget in line for line in said)


PAPER = {  # all that steers what runs, as it was when the recipe was made; it stays so when defaults move
    "keep_ratio": 0.5,
    "keep_ratio_end": None,
    "keep_ratio_steps": None,
    "share": "sample",
    "least_score": None,
    "visual_keep_ratio": 1.0,
    "visual_score": "random",
    "dense_layers": 1,
    "dense_last_layers": 0,
    "warmup_steps": 100,
    "cycle_steps": 128,
    "dense_steps": 16,
    "dense_at": "start",
    "dense_from": None,
    "difficulty": "own",
    "ema_decay": 0.9,
    "reference_weight": 0.5,
    "fusion": "sum",
    "score": "regate",
    "budget": "uniform",
    "packed_ratio": "sample",
    "context": "all",
    "teacher_visual": "drop",
}


def test_the_recipe_of_the_paper_is_frozen():
    paper = ReGateConfig(recipe="paper")
    assert RECIPES["paper"].values == PAPER
    assert {name: getattr(paper, name) for name in PAPER} == PAPER
    assert parse(["--regate", "--regate-recipe", "paper"]) == paper


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_beside_a_recipe_wins_even_where_it_is_the_default(recipe):
    values = RECIPES[recipe].values
    for name in values:
        default = next(field.default for field in dataclasses.fields(ReGateConfig) if field.name == name)
        if default is None:
            continue
        assert getattr(ReGateConfig(recipe=recipe, **{name: default}), name) == default
        words = (["--regate-recipe", recipe], [flag(name), str(default)])
        for first, last in (words, words[::-1]):
            assert getattr(parse(["--regate", *first, *last]), name) == default
    plain = {field.name: field.default for field in dataclasses.fields(ReGateConfig)}
    assert dataclasses.asdict(ReGateConfig(recipe=recipe)) == plain | values | {"recipe": recipe}


def test_every_reader_of_megatrons_arguments_finds_the_recipes_values():
    parser = add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--regate-budget", "dealt", "--regate-recipe", "paper"])
    assert (args.regate_score, args.regate_budget) == ("regate", "dealt")
    assert parser.parse_args([]).regate_recipe is None


def test_the_last_of_several_recipes_holds_and_nothing_of_the_others():
    words = ["--regate-ema-decay", "0.5", "--regate-recipe", "paper", "--regate-recipe", "pictures"]
    assert parse(["--regate", *words]) == ReGateConfig(recipe="pictures", ema_decay=0.5)


def test_pictures_need_no_teacher_unless_targets_are_left_out_too():
    assert not ReGateConfig(recipe="pictures").needs_teacher
    both = ReGateConfig(recipe="pictures", keep_ratio=0.5, teacher_load="student")
    assert both.needs_teacher and (both.score, both.visual_score) == ("reference", "even")


def test_replacing_a_setting_keeps_the_others_of_a_recipe():
    config = dataclasses.replace(ReGateConfig(recipe="pictures", keep_ratio=0.25), score="random")
    assert (config.score, config.keep_ratio, config.recipe) == ("random", 0.25, "pictures")


@pytest.mark.parametrize(("given", "named"), [("deal", "dealt"), ("persample", "per-sample"), ("7", "dealt")])
def test_a_choice_that_is_none_is_answered_by_the_nearest_one_or_the_default(given, named):
    with pytest.raises(ReGateError, match=rf"given {given}; .* change it to {named}$"):
        ReGateConfig(budget=given)


def test_flags_without_the_switch_are_said_to_do_nothing(monkeypatch, capsys):
    flags = ["--lr", "1", "--regate-keep-ratio", "0.3", "--regate-trace=/logs"]
    for rank, said in (("1", ""), ("0", "[regate] off: --regate-keep-ratio, --regate-trace given without --regate")):
        monkeypatch.setenv("RANK", rank)
        launch._say_what_is_idle(flags)
        assert capsys.readouterr().out.startswith(said)
    launch._say_what_is_idle(["--lr", "1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("estimat", "it to estimate"),
        ("dry_run", "it to dry-run"),
        ("docter", "it to doctor"),
        ("train.py", "the path"),
        ("estimate", "the command: leave --cpu out"),  # it would not come here without
        ("--regate", "the order: the script comes before its flags"),
    ],
)
def test_a_misspelt_command_is_answered_by_the_nearest_and_a_missing_script_by_its_path(word, change):
    with pytest.raises(ReGateError, match=rf"^regate: launcher: given {word}; allowed a script: .*; change {change}$"):
        launch._script_and_flags([word, "--length", "4096"])
