"""What Megatron-LM's flags tell of a run, in no framework's words."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("megatron.training", reason="megatron-core is not installed")

from megatron.training.arguments import add_megatron_arguments

from regate_megatron.integrations.flags import run_of
from regate_megatron.support import HostRun


def _run(*flags: str, **others) -> HostRun:
    return run_of(add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags), **others)


def test_flags_that_are_absent_tell_what_a_run_without_them_has():
    run = _run()
    assert run == HostRun(flags=run.flags)


def test_each_flag_is_told_in_its_field():
    folders = ("--load", "old", "--save", "new", "--non-persistent-global-ckpt-dir", "quick")
    run = _run(*folders, "--non-persistent-ckpt-type", "global", "--async-save", "--micro-batch-size", "3")
    assert (run.load, run.save, run.non_persistent_folder) == (Path("old"), Path("new"), Path("quick"))
    assert (run.keeps_non_persistent, run.async_save, run.micro_batch_size) == (True, True, 3)
    assert not _run("--non-persistent-ckpt-type", "local").keeps_non_persistent
    assert _run("--tokenizer-model", "tokens").tokenizer_model == "tokens"


def test_what_a_rule_looks_at_has_the_name_the_user_wrote():
    assert _run("--use-megatron-fsdp").fsdp == "--use-megatron-fsdp"
    assert _run("--use-torch-fsdp2").fsdp == "--use-torch-fsdp2"
    assert _run("--reset-attention-mask").document_masks == "--reset-attention-mask"


def test_what_flags_do_not_tell_is_given_beside_them():
    run = _run(iteration=7, tokenizer="words")
    assert (run.iteration, run.tokenizer, run.flags.micro_batch_size) == (7, "words", None)
