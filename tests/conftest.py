"""What passed, where a page is made of it."""

from __future__ import annotations

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what passed where REGATE_TEST_RESULTS names a file; docs/models.py makes its table of it."""
    file = os.environ.get("REGATE_TEST_RESULTS")
    if file and (report.when == "call" or report.outcome != "passed"):
        with open(file, "a") as lines:
            lines.write(json.dumps([report.nodeid, report.outcome]) + "\n")
