"""Whether it is worth it: the work counted by hand, the line of the log, and the command that says it before a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from regate_megatron import ReGateConfig
from regate_megatron.__main__ import main
from regate_megatron.method.worth import Decoder, Outlook, Rows, outlook
from regate_megatron.step.counters import Counters
from regate_megatron.step.outlook import decoder_of, describe, outlook_of

SMALL = Decoder(layers=4, dense_layers=1, hidden=2, ffn=3, kv=2, vocabulary=5, gated=False)


def test_work_is_what_a_count_by_hand_says():
    """A layer has 4·2·2 of attention and 2·2·3 of the MLP for a position, and 2 for each two positions."""
    rows = Rows(10, 100)
    assert SMALL.layer(rows) == 10 * (16 + 12) + 2 * 100
    assert SMALL.whole(rows) == 4 * 480 + 10 * 10
    assert SMALL.shortened(Rows(5, 25)) == 3 * (5 * 28 + 50) + 5 * 10
    assert SMALL.shortened(rows) + SMALL.layer(rows) == SMALL.whole(rows)


def test_the_outlook_follows_from_it():
    dense, short = Rows(10, 100), Rows(5, 25)
    found = outlook(SMALL, dense=dense, short=short, text=dense, imbalance=1.5, sparse=0.875, taught=0.5)
    assert found.step == (480 + 1.5 * 620) / 2020 and found.teacher == pytest.approx(1 / 3)
    assert found.cycle == pytest.approx(0.125 + 0.875 * found.step)
    assert found.speedup_if_new == pytest.approx(1 / (found.cycle + 0.5 / 3))
    assert outlook(SMALL, dense=dense, short=short, text=None, sparse=1, taught=1).teacher == 0


@pytest.mark.parametrize(
    ("step", "teacher", "verdict"),
    [(0.99, 0.0, "hardly worth it"), (0.8, 0.3, "worth it where samples come again"), (0.5, 0.1, "worth it")],
)
def test_the_verdict_counts_the_teacher_where_samples_are_new(step, teacher, verdict):
    found = Outlook(step, teacher, 0.875, 0.875)
    assert found.verdict().startswith(verdict) and (verdict != "worth it" or found.verdict() == verdict)


def _counters(**changes) -> Counters:
    """One sparse step of two ranks with a row each, 10 positions of which 6 are targets and 3 are kept."""
    found = Counters(targets_total=12, targets_kept=6, visual_total=4, visual_kept=4)
    for _ in range(2):
        found.add_lengths(1, 10, 7, 4, 3)
    found.sparse_positions, found.sparse_positions_slowest, found.sparse_positions_dense = 14, 14, 20
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_a_counted_step_gives_the_same_outlook_as_its_rows():
    config = ReGateConfig(score="reference")
    expected = outlook(
        SMALL, dense=Rows(20, 200), short=Rows(14, 98), text=Rows(16, 128), sparse=112 / 128, taught=112 / 128
    )
    assert outlook_of(_counters(), SMALL, config) == expected
    slower = outlook_of(_counters(sparse_positions_slowest=20), SMALL, config)
    assert slower.step - expected.step == pytest.approx(
        6 / 14 * SMALL.shortened(Rows(14, 98)) / SMALL.whole(Rows(20, 200))
    )
    assert outlook_of(_counters(), SMALL, ReGateConfig(score="random")).teacher == 0


def test_the_line_says_what_went_and_what_to_change_where_that_is_little():
    line = describe(_counters(), outlook_of(_counters(), SMALL, ReGateConfig()), ReGateConfig())
    assert line.startswith("is it worth it? Of the positions 60.0% are answer tokens and 20.0% visual; 30.0% went; a ")
    little = Outlook(0.99, 0.1, 0.875, 0.875)
    assert describe(_counters(visual_total=14), little, ReGateConfig()).endswith(
        "much is visual: --regate-recipe pictures"
    )
    assert describe(_counters(), little, ReGateConfig(budget="uniform")).endswith("--regate-budget dealt")


def test_a_mixture_of_experts_counts_what_runs():
    config = SimpleNamespace(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=32,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=4,
        num_query_groups=2,
        num_attention_heads=4,
        kv_channels=2,
        gated_linear_unit=True,
    )
    found = decoder_of(config, ReGateConfig(dense_last_layers=1), 11)
    assert found == Decoder(layers=2, dense_layers=2, hidden=8, ffn=36, kv=4, vocabulary=11)


def _said(capsys, *words: object) -> list[str]:
    main(["estimate", *map(str, words)])
    return capsys.readouterr().out.splitlines()


MODEL = ("--layers", 4, "--hidden", 64, "--ffn", 128, "--vocabulary", 100)


def test_estimate_says_for_every_budget_what_rows_alike_would_save(capsys):
    said = _said(capsys, "--length", 1024, "--targets", 512, *MODEL, "--regate-score", "random")
    assert "1 rows of 1,024 positions (mean): 50.0% answer tokens, 0.0% visual, 0.0% padding; 25.0% could go" in said[0]
    budgets = {line.split()[1]: line.split()[2:] for line in said[2:6]}
    assert set(budgets) == {"uniform", "balanced", "per-sample", "dealt"}
    assert len({tuple(values) for values in budgets.values()}) == 1  # rows alike: no budget does better
    assert said[-1].endswith(": worth it") and "teacher" not in said[-1]


def test_estimate_takes_rows_of_a_trace_and_knows_that_the_slowest_rank_decides(capsys, tmp_path):
    rows = [(40, 10), (40, 40), (900, 20)] * 5
    with (tmp_path / "dp00000.jsonl").open("w") as file:
        for context, targets in rows:
            row = {"num_context": context, "num_targets": targets, "num_visual": 0}
            file.write(json.dumps({"dense_length": 1024, "rows": [row]}) + "\n")
    said = _said(capsys, "--trace", tmp_path, *MODEL, "--ranks", 16, "--rows", 4, "--regate-score", "random")
    step = {line.split()[1]: float(line.split()[2].rstrip("%")) for line in said[2:6]}
    assert said[0].startswith("[estimate] 15 rows of 1,024 positions")
    assert step["dealt"] < step["per-sample"] < step["uniform"] and step["dealt"] < step["balanced"]


_RECORD = '{"dense_length": 100, "rows": [{"num_context": 50, "num_targets": 20, "num_visual": 0}]}'


def test_the_last_line_of_a_trace_that_a_run_still_writes_is_left(capsys, tmp_path):
    (tmp_path / "dp00000.jsonl").write_text(f"{_RECORD}\n{_RECORD}\n{_RECORD[:40]}")
    assert _said(capsys, "--trace", tmp_path, *MODEL, "--regate-score", "random")[0].startswith("[estimate] 2 rows")


@pytest.mark.parametrize("line", ["[]", "{}", '{"dense_length"', _RECORD.replace("20", '"x"')])
def test_a_file_that_is_no_trace_is_refused_in_one_line(capsys, tmp_path, line):
    path = tmp_path / "dp00000.jsonl"
    path.write_text(f"{_RECORD}\n{line}\n")
    with pytest.raises(SystemExit):
        main(["estimate", "--trace", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"regate: estimate: --trace: given {path}, unreadable (") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ((), "no rows"),
        (("--length", 10, "--targets", 11), "11 targets and 0 visual positions in 10 of 10"),
        (("--length", 10), "a row without --targets"),
        (("--length", 10, "--targets", 1, "--regate-recipe", "pictures"), "a row without --visual"),
        (("--length", 10, "--targets", 1, "--rank", 3), "--rank"),
        (("--lenght", 10, "--targets", 1), "--lenght; allowed "),
        (("--length", 10, "--targets", 1, 300), "300; allowed "),
        (("--length", 10, "--targets", "x"), "invalid int value: 'x'; allowed "),
        (("--length", 10, "--targets"), "no value; allowed "),
        (("--length", 10, "--targets", 1, "--regate-keep-ratio"), "no value; allowed "),
        (("--length", 10, "--targets", -1), "-1; allowed an integer of 0 or more"),
        (("--trace", "nowhere", "torchrun", "train.py"), "--trace; allowed "),
        (("--length", 10, "--targets", 1, "--ranks", 0), "0"),
        (("--length", 10, "--regate-score", "other"), "other"),
        (("--trace", "nowhere"), "nowhere without rows"),
        (("--trace", "nowhere", "--length", 10), "--length beside --trace"),
    ],
    ids=str,
)
def test_estimate_refuses_in_one_line(capsys, words, given):
    with pytest.raises(SystemExit) as end:
        main(["estimate", *map(str, words)])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(lines) == 1 and lines[0].startswith("regate: ")
    assert f"given {given}" in lines[0] and "; allowed " in lines[0] and "; change " in lines[0]
