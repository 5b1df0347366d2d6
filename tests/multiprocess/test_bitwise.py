"""Keep ratio 1.0 is plain Megatron, bit for bit, in Megatron's own optimizer."""

from __future__ import annotations

import pytest

from tests.launch import ROOT, succeed

WORKER = str(ROOT / "tests/multiprocess/run_bitwise.py")


def _equal(steps: int, *names: str) -> None:
    run = succeed(4, [WORKER, steps, *names], timeout_s=900)
    equal = [line.split(": ")[1] for line in run.output.splitlines() if f"equal over {steps} steps" in line]
    assert sorted(equal) == sorted(names)


def test_steps_at_keep_ratio_one_are_plain_megatron():
    _equal(20, "gpt@tp2-dp2", "gpt-ahead@tp2-pp2", "llava@tp2-pp2")


def test_steps_of_dynamic_resolution_at_keep_ratio_one_are_plain_megatron():
    pytest.importorskip("einops", reason="RADIO, the tower of dynamic resolution, needs einops")
    _equal(6, "llava-sized@tp4")


def test_steps_of_mimo_at_keep_ratio_one_are_plain_megatron():
    _equal(20, "mimo@tp2-dp2")


@pytest.mark.full
def test_fifty_steps_at_keep_ratio_one_are_plain_megatron_in_more_layouts():
    _equal(50, "gpt@pp2-vpp2-dp2", "gpt@cp2-tp2-sp", "llava@dp4")
