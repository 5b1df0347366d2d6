"""The launch recipes print lines that hold together; tests/scripts/test_dry_run.py tries them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from regate_megatron.cpu.dry_run.line import parse_line
from regate_megatron.flags import parse_command_line
from tests.launch import ROOT

RECIPES = ROOT / "examples/recipes"


@pytest.fixture
def megatron(tmp_path) -> Path:
    """Where the recipe looks for a checkout; only a path in these tests."""
    (tmp_path / "pretrain_vlm.py").touch()
    return tmp_path


def _printed(recipe: str, megatron: Path, verb: str = "train", **variables: str) -> list[str]:
    """The words of the line that a recipe would launch."""
    env = {**os.environ, "MEGATRON": str(megatron), "LAUNCH": "echo", **variables}
    run = subprocess.run(["bash", RECIPES / recipe, verb], env=env, capture_output=True, text=True, check=True)
    return shlex.split(run.stdout)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("recipe", "ranks"), [("llava_8b.sh", 8), ("slurm.sbatch", 32)])
def test_training_line_is_whole(recipe, ranks, precision, megatron):
    line = parse_line(_printed(recipe, megatron, PRECISION=precision))
    config = parse_command_line(line.flags)
    assert line.num_ranks == ranks and line.script == str(megatron / "pretrain_vlm.py")
    assert config.keep_ratio == 0.5 and config.teacher_load == "/checkpoints/llama3_8b_teacher" and config.trace
    assert ("--fp8-recipe" in line.flags) == (precision == "fp8")
    assert line.flags[line.flags.index("--save") + 1] == line.flags[line.flags.index("--load") + 1]  # a restart resumes


def test_teacher_and_references_use_the_trainings_own_flags(megatron):
    teacher = _printed("llava_8b.sh", megatron, "teacher")
    assert teacher[1].endswith("tools/convert_hf_teacher.py")
    assert teacher[2:] == shlex.split(
        "--source /models/Meta-Llama-3-8B --target /checkpoints/llama3_8b_teacher --tensor-model-parallel-size 4"
    )
    train, references = _printed("llava_8b.sh", megatron), _printed("llava_8b.sh", megatron, "references")
    script = str(megatron / "pretrain_vlm.py")
    same = train[train.index(script) : train.index("--regate-trace")]
    assert references[references.index(script) :] == same
    assert references[references.index(script) - 1].endswith("tools/precompute_references.py")


def test_a_dry_run_has_the_words_of_the_line(megatron):
    line = _printed("llava_8b.sh", megatron)
    tried = _printed("llava_8b.sh", megatron, DRY_RUN="1", DRY_RUN_FLAGS="--max-ranks 4")
    assert tried == ["python", "-m", "regate_megatron", "dry-run", "--max-ranks", "4", *line]


def test_the_slurm_recipe_asks_for_slurm(megatron):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LAUNCH", "DRY_RUN"))}
    command = ["bash", RECIPES / "slurm.sbatch"]
    run = subprocess.run(command, env={**env, "MEGATRON": str(megatron)}, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "given no SLURM job; allowed sbatch" in run.stderr


def test_an_unknown_precision_or_verb_is_refused(megatron):
    for variables, verb in (({"PRECISION": "int3"}, "train"), ({}, "fly")):
        with pytest.raises(subprocess.CalledProcessError) as error:
            _printed("llava_8b.sh", megatron, verb, **variables)
        assert "given" in error.value.stderr and "allowed" in error.value.stderr
