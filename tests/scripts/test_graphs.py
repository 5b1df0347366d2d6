"""CUDA graphs are on in dense steps alone, by the bookkeeping of every checkout's Megatron-Core."""

from __future__ import annotations

import os

import pytest

from tests.launch import ROOT, succeed, torchrun
from tests.multiprocess.test_graphs import CLAIMS, WORKER
from tests.scripts.checkouts import Checkout, parameters


@pytest.mark.parametrize("checkout", parameters())
def test_graphs_are_replayed_in_dense_steps_alone(checkout: Checkout):
    without = {"0.17": ["experts"], "0.20": ["ahead"]}.get(checkout.version.rpartition(".")[0], [])
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(checkout.path)])}
    output = succeed(2, [str(WORKER)], how=torchrun, env=paths).output
    claims = [claim for claim in CLAIMS if claim.split()[-1] not in without]
    assert [claim for claim in claims if f"holds: {claim}\n" not in output] == []
