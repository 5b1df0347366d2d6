"""Batches of Megatron-Bridge's Qwen2.5-VL, read as its model reads them; CPU, a local layer spec, one rank."""

import json

import pytest

from tests.frameworks.test_megatron_bridge import missing
from tests.launch import ROOT, succeed

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = tmp_path_factory.mktemp("qwen") / "results.json"
    succeed(1, [str(ROOT / "tests/frameworks/run_qwen_vl.py"), str(results)])
    return json.loads(results.read_text())


def test_positions_are_those_the_language_model_is_given(found):
    assert found["positions agree"]


def test_placeholders_are_visual_context_and_padding_is_neither(found):
    assert (found["targets"], found["visual"], found["context"]) == ([10, 12], [6, 0], [10, 3])


def test_sparse_steps_run_shorter(found):
    assert "refused" not in found, found.get("refused")
    totals = found["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (3, 2, 0)
    assert totals["targets_kept"] < totals["targets_total"] and totals["positions_run"] < totals["positions_dense"]
