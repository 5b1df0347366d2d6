"""The Megatron-LM checkouts whose own scripts are tested.

MEGATRON_LM_DIR=<one checkout> or MEGATRON_LM_DIRS=<several, colon separated>.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launch as launching
from tests.launch import ROOT, Finished, succeed
from tests.many import Many, Ran

HERE = Path(__file__).parent  # by itself on the path, as a checkout has a package named tests of its own
HOW = "set MEGATRON_LM_DIR=<checkout of Megatron-LM> or MEGATRON_LM_DIRS=<several, colon separated>"

# 127 tokens, and one more where NullTokenizer counts an end of document (core 0.17): padded to 128 in every layout.
COMMON = """--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --hidden-size 64 --num-attention-heads 4
 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 16 --eval-iters 1
 --eval-interval 4 --log-interval 1 --split 90,5,5 --seq-length 64 --position-embedding-type rope --hidden-dropout 0
 --attention-dropout 0 --calculate-per-token-loss --num-workers 0""".split()
GPT = "--num-layers 4 --max-position-embeddings 64 --normalization RMSNorm --disable-bias-linear".split()
VLM = """--num-layers 4 --dataloader-seq-length 32 --max-position-embeddings 256 --img-h 32 --img-w 32 --patch-dim 8
 --ckpt-format torch --normalization LayerNorm""".split()
HYBRID = """--max-position-embeddings 64 --normalization RMSNorm --disable-bias-linear
 --spec hybrid_spec local_hybrid_stack_spec""".split()
LIMIT_S = 900  # for a hung run; on an idle machine of two cores each takes 5 to 30 s
REGATE = "--regate --regate-score regate --regate-warmup-steps 1 --regate-cycle-steps 3 --regate-dense-steps 1".split()
LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


@dataclass(frozen=True)
class Checkout:
    """A checkout of Megatron-LM."""

    path: Path

    @functools.cached_property
    def version(self) -> str:
        """What its megatron.core says it is."""
        text = (self.path / "megatron/core/package_info.py").read_text()
        numbers = [re.search(rf"^{part} = (\d+)", text, re.M)[1] for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(numbers)

    @functools.cached_property
    def commit(self) -> str:
        """Its commit, where it is a git checkout."""
        run = subprocess.run(["git", "-C", self.path, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        return run.stdout.strip()[:10] if (self.path / ".git").exists() else "unknown"

    def script(self, name: str) -> str:
        """The path of a training script; core 0.17 calls pretrain_hybrid.py pretrain_mamba.py."""
        found = self.path / name
        return str(found if found.is_file() else self.path / name.replace("hybrid", "mamba"))


def found() -> list[Checkout]:
    """The checkouts named by the environment.

    Raises:
        pytest.UsageError: one of them is none.
    """
    names = os.environ.get("MEGATRON_LM_DIRS", "").split(":") + [os.environ.get("MEGATRON_LM_DIR", "")]
    checkouts = [Checkout(Path(name).resolve()) for name in dict.fromkeys(names) if name]
    for checkout in checkouts:
        if not (checkout.path / "pretrain_gpt.py").is_file():
            raise pytest.UsageError(f"{checkout.path} is no checkout of Megatron-LM; {HOW}")
    return checkouts


def parameters() -> list:
    """One pytest parameter per checkout, or one that is skipped with its reason."""
    checkouts = found()
    if not checkouts:
        return [pytest.param(None, id="no-checkout", marks=pytest.mark.skip(reason=HOW))]
    return [pytest.param(checkout, id=f"{checkout.version}-{checkout.path.name}") for checkout in checkouts]


def flags_of(script: str, layout: str) -> list[str]:
    """A working command line of a script in a layout, without iterations."""
    specific = {"pretrain_gpt.py": GPT, "pretrain_vlm.py": VLM}.get(script, HYBRID)
    sizes = LAYOUTS[layout][1]
    if specific is HYBRID:
        specific = [*specific, "--hybrid-layer-pattern", "*-*-|*-*-" if layout == "tp2-pp2" else "*-*-*-*-"]
    return [*COMMON, *specific, *sizes]


def command(checkout: Checkout, script: str, layout: str, *flags: str) -> list[str]:
    """The words of a run: a script of a checkout in a layout, four iterations unless ``flags`` say otherwise."""
    iterations = [] if "--train-iters" in flags else ["--train-iters", "4"]
    return [checkout.script(script), *flags_of(script, layout), *iterations, *flags]


def launch(server: Many, checkout: Checkout, script: str, layout: str, *flags: str) -> Ran:
    """Run a script of a checkout through the launcher; ``server`` is the checkout's (conftest.py)."""
    return server.run(LAYOUTS[layout][0], command(checkout, script, layout, *flags))


def torchrun(checkout: Checkout, script: str, layout: str, *flags: str, modules: str = "") -> Finished:
    """The same through torchrun, as users do.

    Args:
        modules: a folder of this one to import from as well.
    """
    words = ["-m", "regate_megatron", "--cpu", *command(checkout, script, layout, *flags)]
    env = {"PYTHONPATH": f"{ROOT}:{HERE}:{HERE / modules}"}
    return succeed(LAYOUTS[layout][0], words, how=launching.torchrun, timeout_s=LIMIT_S, env=env)


def losses(output: str) -> list[float]:
    """The training losses that Megatron printed, as printed."""
    return [float(loss) for loss in re.findall(r"iteration +\d+/.*?lm loss: (\S+)", output)]
