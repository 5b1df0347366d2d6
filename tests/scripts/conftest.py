"""Runs of one checkout come from one process that has imported it; every test says in the junit report which it ran.

docs/versions.py makes a table of the reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.many import Many, many
from tests.scripts.checkouts import HERE, LIMIT_S


@pytest.fixture(autouse=True)
def _checkout_in_report(request, record_property):
    checkout = getattr(request.node, "callspec", None) and request.node.callspec.params.get("checkout")
    if checkout is not None:
        record_property("megatron_core", checkout.version)
        record_property("megatron_commit", checkout.commit)
        record_property("claim", request.node.originalname)


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[dict, ExitStack]]:
    with ExitStack() as stack:
        yield {}, stack


@pytest.fixture
def server(checkout, _servers, tmp_path_factory) -> Many:
    """What runs the scripts of the checkout."""
    servers, stack = _servers
    if checkout not in servers:
        logs = tmp_path_factory.mktemp(f"logs-{checkout.version}")
        servers[checkout] = stack.enter_context(many(logs, HERE, checkout.path, timeout_s=LIMIT_S))
    return servers[checkout]
