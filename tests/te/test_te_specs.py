"""Claims about Transformer Engine's modules; each is a function of run_te.py, all run in one launch. No GPU needed."""

import importlib.util

import pytest

from tests.claims import claims_of
from tests.launch import ROOT, succeed, torchrun

MISSING = "transformer_engine is not installed (docs/transformer_engine.md says how to build it, also without a GPU)"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason=MISSING)

WORKER = ROOT / "tests/te/run_te.py"
HELPERS = {"settings", "gpt", "llava", "attach_keeps_names"}
NAMES = claims_of(WORKER, HELPERS)


@pytest.fixture(scope="module")
def verdicts():
    return succeed(1, [str(WORKER), *NAMES], how=torchrun)


@pytest.mark.parametrize("claim", NAMES)
def test_claim_holds(verdicts, claim):
    assert f"holds: {claim}\n" in verdicts.output, verdicts.errors[-6000:]
