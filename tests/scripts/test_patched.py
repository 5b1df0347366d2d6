"""A script with our patch and the unmodified script under the launcher are the same run."""

from __future__ import annotations

import pytest

from patches.apply import known_patches, run
from tests.launch import succeed, torchrun
from tests.scripts.checkouts import LAYOUTS, REGATE, Checkout, command, losses, parameters

pytestmark = pytest.mark.parametrize("checkout", parameters())
FLAGS = [*REGATE, "--regate-teacher-load", "student"]


@pytest.fixture
def patched(checkout, tmp_path) -> Checkout:
    """A folder like the checkout, with its scripts patched: links to everything else."""
    scripts = {patch.script for patch in known_patches()}
    for entry in checkout.path.iterdir():
        if entry.name in scripts:
            (tmp_path / entry.name).write_bytes(entry.read_bytes())
        elif not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    try:
        run("apply", tmp_path)
    except ValueError as error:
        pytest.skip(f"no patch for this checkout: {error}")
    return Checkout(tmp_path)


def _trained(output: str) -> tuple[list[float], list[str]]:
    """Losses and our own lines, without times."""
    ours = [line.split(" | per step")[0] for line in output.splitlines() if line.startswith("[regate] iteration")]
    return losses(output), ours


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "pretrain_vlm.py", "pretrain_hybrid.py"])
def test_patch_and_launcher_give_identical_runs(server, checkout, patched, script, record_property):
    num_ranks = LAYOUTS["dp2"][0]
    ours, theirs = (command(one, script, "dp2", *FLAGS) for one in (patched, checkout))
    if script == "pretrain_gpt.py":
        output = succeed(num_ranks, ["tests/scripts/run_emulated.py", *ours], how=torchrun).output
        assert len(losses(output)) == 4 and _trained(output) == _trained(server.run(num_ranks, theirs).output)
        return
    alone, launched = server.run(num_ranks, ours, ok=None, plain=True), server.run(num_ranks, theirs, ok=None)
    assert _trained(alone.output) == _trained(launched.output)
    if script == "pretrain_hybrid.py" and checkout.version.startswith("0.17."):  # before HybridModel
        refusals = [[s for s in one.output.splitlines() if s.startswith("regate: ")] for one in (alone, launched)]
        assert refusals[0] == refusals[1] and len(refusals[0]) == 1
        record_property("outcome", "refused")
    else:
        assert len(losses(alone.output)) == 4 and not any(alone.codes + launched.codes)
