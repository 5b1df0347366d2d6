"""A sparse step is the masked full-length step with the Megatron-Core of every checkout, in every layout."""

from __future__ import annotations

import os

import pytest

from tests.launch import ROOT
from tests.multiprocess import test_parity_ahead as ahead
from tests.multiprocess import test_parity_lengths as lengths
from tests.multiprocess import test_parity_pictures as pictures
from tests.multiprocess.parity import assert_exact, assert_keeps_the_same, run_cases
from tests.multiprocess.test_parity import FOUR_RANKS, ONE_RANK
from tests.scripts.checkouts import Checkout, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())


def _is_known(case: dict, checkout: Checkout) -> bool:
    """Whether this Megatron-Core runs the case at all.

    0.17 pads no LLaVA rows, and only some merge packed rows. Layers that predict ahead: 0.17 tells their experts of no
    padding (refused), 0.18 cannot recompute them, 0.20 cannot build them without Transformer Engine. Pictures of
    dynamic resolution: 0.17 has none, 0.20 no clips, and takes one row with pictures at a time.
    """
    version = checkout.version
    if case.get("config", {}).get("mtp_num_layers"):
        has_experts, recomputes = "num_moe_experts" in case["config"], "recompute" in case
        wrong = {"0.17.": has_experts, "0.18.": recomputes, "0.20.": True}
        if any(cannot and version.startswith(start) for start, cannot in wrong.items()):
            return False
    if sizes := case.get("dynamic"):
        is_alone = case.get("rows") == 1 and sizes.get("frames", 1) == 1
        return not version.startswith("0.17.") and (is_alone or not version.startswith("0.20."))
    if case.get("packed") and case["model"] != "llava":
        return "def flatten_batch_for_packed_sequences" in (checkout.path / "megatron/core/utils.py").read_text()
    is_cut = case.get("sp") or case.get("cp", 1) > 1
    return not (is_cut and case["model"] == "llava" and version.startswith("0.17."))


def test_sparse_step_equals_masked_dense_step_in_every_layout(checkout: Checkout, tmp_path):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(checkout.path)])}
    one_rank = [*ONE_RANK, *lengths.ONE_RANK, *ahead.ONE_RANK, *pictures.ONE_RANK]
    four_ranks = [*FOUR_RANKS, *lengths.FOUR_RANKS, *ahead.FOUR_RANKS]
    results = {}
    for num_ranks, cases in ((1, one_rank), (4, four_ranks)):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        cases = [case for case in cases if _is_known(case, checkout)]
        results[num_ranks] = run_cases(num_ranks, cases, folder, env=paths)
    everything = results[1] | results[4]
    for result in everything.values():
        assert_exact(result)
    alone = {one["name"]: one["name"].split("@")[0] for one in FOUR_RANKS if one.get("budget") != "balanced"}
    for name, like in (alone | {one["name"]: one["like"] for one in lengths.HELD}).items():
        if name in everything:
            assert_keeps_the_same(everything[like], everything[name], 18 if "packed" in name else 8)
