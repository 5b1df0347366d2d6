"""Every test of this folder says in the junit report which checkout it ran (docs/versions.py makes a table of it)."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _checkout_in_report(request, record_property):
    checkout = getattr(request.node, "callspec", None) and request.node.callspec.params.get("checkout")
    if checkout is not None:
        record_property("megatron_core", checkout.version)
        record_property("megatron_commit", checkout.commit)
        record_property("claim", request.node.originalname)
