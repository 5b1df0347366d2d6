"""A script with our patch and the unmodified script under the launcher are the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from patches.apply import known_patches, run
from tests.launch import succeed
from tests.scripts.checkouts import LAYOUTS, REGATE, flags_of, losses, parameters, torchrun

pytestmark = pytest.mark.parametrize("checkout", parameters())


@pytest.fixture
def patched(checkout, tmp_path) -> Path:
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
    return tmp_path


@pytest.mark.parametrize("script", ["pretrain_gpt.py", "pretrain_vlm.py"])
def test_patch_and_launcher_give_identical_runs(checkout, patched, script, tmp_path):
    flags = [*REGATE, "--regate-teacher-load", "student"]
    command = ["tests/scripts/run_emulated.py", patched / script, *flags_of(script, "dp2"), "--train-iters", "4"]
    ours = succeed(LAYOUTS["dp2"][0], [*command, *flags])
    launched = torchrun(checkout, script, "dp2", *flags)
    assert losses(ours.output) == losses(launched.output) and len(losses(ours.output)) == 4
    kept = [line.split(" | per step")[0] for line in ours.output.splitlines() if line.startswith("[regate] iteration")]
    assert len(kept) == 4 and all(line in launched.output for line in kept)


def test_a_patched_hybrid_script_knows_the_flags(checkout, patched):
    name = "pretrain_hybrid.py" if (patched / "pretrain_hybrid.py").exists() else "pretrain_mamba.py"
    run = succeed(1, ["tests/scripts/run_emulated.py", patched / name, "--help"])
    assert "--regate-keep-ratio" in run.output
