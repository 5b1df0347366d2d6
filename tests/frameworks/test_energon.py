"""Megatron-energon's loader feeds attached LLaVA and GPT models, in the layout of examples/multimodal."""

import importlib.util
import json

import pytest

from tests.launch import ROOT, succeed, torchrun


def missing() -> str:
    """Why this cannot run here; empty where it can."""
    try:
        found = importlib.util.find_spec("megatron.energon")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "megatron.energon is not installed (pip install megatron-energon)"
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SAMPLES, STEPS, ROWS_PER_STEP, DENSE_STEPS = 12, 5, 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("energon")
    command = [ROOT / "tests/frameworks/run_energon.py", folder, folder / "results.json"]
    succeed(1, command, how=torchrun)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("model", ["llava", "gpt"])
def test_sparse_steps_run_shorter_on_energon_s_batches(runs, model):
    totals = runs[model]["totals"]
    assert (totals["steps"], totals["sparse_steps"], totals["fallback_steps"]) == (STEPS, STEPS - DENSE_STEPS, 0)
    assert 0.5 <= totals["targets_kept"] / totals["targets_total"] < 1
    assert totals["positions_run"] < totals["positions_dense"]


@pytest.mark.parametrize("model", ["llava", "gpt"])
def test_the_script_s_loss_counts_kept_targets_only(runs, model):
    assert runs[model]["counted"] == runs[model]["totals"]["targets_kept"]


@pytest.mark.parametrize("model", ["llava", "gpt"])
def test_a_sample_has_one_key_in_every_epoch_and_batch(runs, model):
    """Energon shuffles anew in the second pass; its own keys differ between versions, ours are made of content."""
    keys = runs[model]["keys"]
    assert len(keys) == STEPS * ROWS_PER_STEP
    assert len(set(keys)) == len(set(keys[:SAMPLES])) == SAMPLES


def test_both_models_learn_from_the_same_targets(runs):
    assert runs["llava"]["totals"]["targets_total"] == runs["gpt"]["totals"]["targets_total"]


def test_samples_that_energon_packs_keep_what_they_keep_in_rows_of_their_own(runs):
    """As examples/multimodal packs them; sparse steps of both see most of the samples, in an order of their own."""
    packed, rows = runs["packed"], runs["each"]
    assert packed["totals"]["sparse_steps"] == STEPS - DENSE_STEPS and packed["totals"]["fallback_steps"] == 0
    assert set(packed["keys"]) == set(rows["keys"])
    both = packed["kept"].keys() & rows["kept"].keys()
    assert len(both) >= SAMPLES // 2 and all(packed["kept"][key] == rows["kept"][key] for key in both)
    assert packed["counted"] == packed["totals"]["targets_kept"] < packed["totals"]["targets_total"]
