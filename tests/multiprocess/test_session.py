"""Claims about a session on one rank; each is a function of run_session.py, all run in one launch."""

import pytest

from tests.claims import claims_of
from tests.launch import ROOT, succeed

WORKER = ROOT / "tests/multiprocess/run_session.py"
HELPERS = {"config", "attached", "refused", "attach_tied_teacher", "values_of", "continues"}
CLAIMS = claims_of(WORKER, HELPERS)


@pytest.fixture(scope="module")
def verdicts():
    return succeed(1, [str(WORKER), *CLAIMS])


@pytest.mark.parametrize("claim", CLAIMS)
def test_claim_holds(verdicts, claim):
    assert f"holds: {claim}\n" in verdicts.output, verdicts.errors[-6000:]
