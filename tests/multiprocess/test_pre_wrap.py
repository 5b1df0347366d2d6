"""attach as Megatron-LM's pre-wrap hook, and in a loop of one's own."""

from __future__ import annotations

import re

import pytest

from tests.launch import ROOT, succeed, torchrun


def test_attach_serves_as_a_pre_wrap_hook():
    """Called with unwrapped chunks before weights are loaded; trains as if attached afterwards."""
    pytest.importorskip("megatron.training.models.base", reason="megatron.training before 0.18 has no pre-wrap hooks")
    run = succeed(2, [str(ROOT / "tests/multiprocess/run_pre_wrap.py")])
    assert "holds on rank 0" in run.output and "holds on rank 1" in run.output


def test_own_loop_trains_sparsely():
    run = succeed(2, [str(ROOT / "examples/own_loop.py")], how=torchrun)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", run.output)]
    assert len(losses) == 8 and losses[0] > 3.9 and losses[-1] < losses[0] - 0.5  # ln 64 is 4.16
    assert "compacts after 1 dense layers" in run.output and "arrives short" in run.output
    assert run.output.count("phase sparse, dense_length 48, kept_length 32") == 3
