"""The FLOPs reported for elided steps are those of Megatron's own formula at the lengths that ran."""

from __future__ import annotations

import copy
from argparse import ArgumentParser

import pytest

training = pytest.importorskip("megatron.training.training", reason="megatron.training is not installed")

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from regate_megatron import ReGateConfig  # noqa: E402
from regate_megatron.integrations.flops import share_of_dense  # noqa: E402
from regate_megatron.step.counters import Counters  # noqa: E402

LAYERS, DENSE, KEPT = 6, 512, 320


@pytest.fixture(scope="module")
def args():
    flags = "--num-layers 6 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256 --kv-channels 16".split()
    args = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args([*flags, "--seq-length", str(DENSE)])
    args.padded_vocab_size = 1024
    return args


def _flops(args, **changes):
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    return training.num_floating_point_operations(changed, 4)


def _share(args, first, last=0, length=KEPT):
    work = Counters()
    work.add_lengths(4, DENSE, length, LAYERS, LAYERS - first - last)
    config = ReGateConfig(dense_layers=first, dense_last_layers=last)
    return share_of_dense(training.num_floating_point_operations, args, work, config)


def test_with_no_dense_layer_the_step_counts_as_one_of_the_kept_length(args):
    assert _share(args, 0) == pytest.approx(_flops(args, seq_length=KEPT) / _flops(args), rel=1e-12)


def test_dense_layers_count_at_full_length_and_logits_at_the_kept_one(args):
    long_layers = _flops(args, num_layers=2, padded_vocab_size=0)
    short_layers_and_logits = _flops(args, num_layers=LAYERS - 2, seq_length=KEPT)
    expected = pytest.approx((long_layers + short_layers_and_logits) / _flops(args), rel=1e-12)
    assert _share(args, 2) == _share(args, 1, last=1) == expected


def test_layers_that_predict_ahead_count_at_the_kept_length(args):
    ahead = copy.copy(args)
    ahead.mtp_num_layers = 2
    long_layers = _flops(args, num_layers=2, padded_vocab_size=0)
    short_layers_and_logits = _flops(ahead, num_layers=LAYERS - 2, seq_length=KEPT)
    assert _share(ahead, 2) == pytest.approx((long_layers + short_layers_and_logits) / _flops(ahead), rel=1e-12)


@pytest.mark.parametrize(("first", "last", "long"), [(1, 0, "*"), (2, 1, "*-E"), (0, 2, "*E"), (0, 0, "")])
def test_layers_of_a_hybrid_model_count_as_what_they_are(args, first, last, long):
    """Attention alone has squares, and experts are as wide as they are: which layers are dense matters."""
    hybrid = copy.copy(args)
    hybrid.hybrid_layer_pattern, hybrid.moe_ffn_hidden_size = "*-|*-*E", 32
    rest = "*-*-*E"[first : LAYERS - last]
    long_layers = _flops(hybrid, hybrid_layer_pattern=long, padded_vocab_size=0) if long else 0
    short_layers_and_logits = _flops(hybrid, hybrid_layer_pattern=rest, seq_length=KEPT)
    expected = (long_layers + short_layers_and_logits) / _flops(hybrid)
    assert _share(hybrid, first, last) == pytest.approx(expected, rel=1e-12)
    assert _share(hybrid, first, last, length=DENSE) == pytest.approx(1, rel=1e-12)


def test_a_dense_step_counts_in_full_and_the_namespace_is_left_alone(args):
    before = dict(vars(args))
    assert _share(args, 0, length=DENSE) == pytest.approx(1, rel=1e-12)
    assert share_of_dense(training.num_floating_point_operations, args, Counters(), ReGateConfig()) == 1.0
    assert vars(args) == before


def test_steps_of_an_interval_weigh_by_their_work(args):
    work = Counters()
    work.add_lengths(4, DENSE, DENSE, LAYERS, 0)
    work.add_lengths(4, DENSE, KEPT, LAYERS, LAYERS)
    share = share_of_dense(training.num_floating_point_operations, args, work, ReGateConfig(dense_layers=0))
    assert share == pytest.approx((1 + _share(args, 0)) / 2, rel=1e-12)
