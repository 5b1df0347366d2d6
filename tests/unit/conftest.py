"""Settings of the unit tests: one process, the same examples in every run, no time limit per example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("regate", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("regate")
