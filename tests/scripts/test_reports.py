"""What a run leaves behind: checkpoints, TensorBoard, W&B (a stub of its module), throughput."""

from __future__ import annotations

import json

import pytest

from regate_megatron.teacher.weights import saved_arguments
from tests.scripts.checkouts import REGATE, parameters, torchrun

pytestmark = pytest.mark.parametrize("checkout", parameters())
WRITERS = """--log-throughput --log-timers-to-tensorboard --tensorboard-log-interval 1 --save-interval 4
 --wandb-project stub --wandb-exp-name stub""".split()
METRICS = {"targets-kept", "positions-run", "dense-equivalent", "flops", "sparse-steps", "teacher-ms-per-step"}
KEPT_LENGTH, DENSE_LENGTH = 32, 64


@pytest.fixture(scope="module")
def runs() -> dict:
    return {}


@pytest.fixture
def reported(checkout, runs, tmp_path_factory):
    """One run of pretrain_gpt.py with all layers sparse: its folder, and its event file read back."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    if checkout not in runs:
        folder = tmp_path_factory.mktemp("reports")
        flags = [*REGATE, "--regate-score", "student", "--regate-dense-layers", "0", "--save", str(folder / "save")]
        flags += [*WRITERS, "--tensorboard-dir", str(folder / "events"), "--wandb-save-dir", str(folder / "wandb")]
        torchrun(checkout, "pretrain_gpt.py", "dp2", *flags, modules="stubs")
        events = accumulator.EventAccumulator(str(folder / "events")).Reload()
        scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        runs[checkout] = folder, scalars
    return runs[checkout]


def test_tensorboard_has_our_metrics_per_interval(reported):
    _, scalars = reported
    assert {f"regate/{name}" for name in METRICS} <= set(scalars)
    assert scalars["regate/targets-kept"] == {1: 1, 2: 1, 3: 0.5, 4: 0.5}
    assert scalars["regate/sparse-steps"] == {1: 0, 2: 0, 3: 1, 4: 1}


def test_wandb_gets_the_numbers_of_tensorboard(reported):
    folder, scalars = reported
    logged = [json.loads(line) for line in (folder / "wandb" / "stub.jsonl").read_text().splitlines()]
    ours = {line["step"]: line for line in logged if "regate/flops" in line}
    assert set(ours) == {1, 2, 3, 4}
    for name in METRICS:
        assert [ours[step][f"regate/{name}"] for step in ours] == pytest.approx(
            [scalars[f"regate/{name}"][step] for step in ours], rel=1e-6
        )


def test_throughput_counts_the_flops_that_ran(reported):
    """TFLOP/s times seconds are FLOPs: a sparse step shows those of the kept length, by Megatron's own formula."""
    _, scalars = reported
    flops = {step: scalars["throughput"][step] * scalars["iteration-time"][step] for step in (2, 3, 4)}
    # 4 layers of 12 h² weights and S·h attention, and logits of 128: linear and quadratic parts of GPT at h = 64.
    linear, quadratic = 4 * 12 * 64**2 + 64 * 128, 4 * 64
    share = (linear + quadratic * KEPT_LENGTH) * KEPT_LENGTH / ((linear + quadratic * DENSE_LENGTH) * DENSE_LENGTH)
    assert flops[3] / flops[2] == pytest.approx(share, rel=1e-5)
    assert scalars["regate/flops"][4] == pytest.approx(flops[4] / flops[2], rel=1e-5)


def test_checkpoints_hold_our_flags(reported):
    folder, _ = reported
    saved = saved_arguments(folder / "save" / "iter_0000004")
    assert saved.regate is True and saved.regate_keep_ratio == 0.5 and saved.regate_score == "student"
