"""CUDA graphs are on in dense steps alone, by the bookkeeping of every checkout's Megatron-Core."""

from __future__ import annotations

import os

import pytest

from tests.launch import ROOT, succeed, torchrun
from tests.multiprocess.test_graphs import CLAIMS, WORKER
from tests.scripts.checkouts import Checkout, parameters


@pytest.mark.parametrize("checkout", parameters())
def test_graphs_are_replayed_in_dense_steps_alone(checkout: Checkout):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(checkout.path)])}
    output = succeed(2, [str(WORKER)], how=torchrun, env=paths).output
    without = ["experts"] if checkout.version.startswith("0.17.") else []
    claims = [claim for claim in CLAIMS if claim.split()[-1] not in without]
    assert [claim for claim in claims if f"holds: {claim}\n" not in output] == []
