"""Train a small vision-language model on real pretrained weights, dense and with ReGATE, and compare.

    python examples/experiments/run.py                     the main arms, three seeds each: about an hour on two cores
    python examples/experiments/run.py --all               every arm: about three hours
    python examples/experiments/run.py --arms dense,regate --seeds 1
    python examples/experiments/run.py --config examples/experiments/configs/h200.toml --all

Everything is Megatron's own training loop on examples/demo/train.py, through the launcher:

1. weights.py brings the language model, captions.py pictures with captions in its tokens;
2. per seed the language model reads the captions without pictures: the frozen teacher; a LLaVA is built around it with
   a projector from the seed and a vision tower that has learned to name words (tower.py), and learns from short
   captions to use them (dense);
3. arms.toml names the runs; all arms of a seed have one start and the same samples in the same order;
4. results.py writes results.csv, summary.md and the pictures.

Finished runs are kept and not repeated while their settings stay the same: start it again after an interruption.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "demo")]

import captions  # noqa: E402
import results  # noqa: E402
import weights  # noqa: E402
from launch import CommandError, run_command, torchrun  # noqa: E402

TRAIN = HERE.parent / "demo" / "train.py"
SEEDS = 3
LOAD = "--finetune --no-load-optim --no-load-rng"


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    flags: str
    iterations: int
    is_fresh: bool

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


class Experiment:
    """The stages, in order; everything lies in `out`."""

    def __init__(self, config: dict, out: Path) -> None:
        self.config, self.train, self.out = config, config["train"], out
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Weights, pictures and captions, the language model with their vocabulary in Megatron's format."""
        name = self.config["language_model"]
        language_model = weights.prepare(name, self.out / "weights" / Path(name).name)
        self.data = captions.prepare(self.out / "data", language_model, **self.config["data"])
        self.about = json.loads((self.data / "about.json").read_text())
        settings = fingerprint(self.about)
        self.language_model = self.out / "language_model"
        if not is_done(self.language_model, settings):
            aside = fresh(self.language_model.with_suffix(".incomplete"))
            captions.cut_vocabulary(language_model, self.data, aside / "hf")
            tool = [
                sys.executable,
                str(ROOT / "tools" / "convert_hf_teacher.py"),
                "--make-vocab-size-divisible-by",
                "16",
            ]
            command = [*tool, "--source", str(aside / "hf"), "--target", str(aside / "megatron")]
            run_command(command, self.logs / "convert.log", title="weights")
            finish(aside, self.language_model, settings)
        log = (self.logs / "convert.log").read_text().splitlines()
        architecture = log[log.index("its flags:") + 1].split("--tokenizer-type")[0]
        self.flags = [
            *architecture.split(),
            *self.train["shared"].split(),
            *f"--tokenizer-type NullTokenizer --vocab-size {self.about['vocabulary']} --ckpt-format torch_dist".split(),
        ]

    def start(self, seed: int) -> Path:
        """The LLaVA every run of a seed starts from, and its teacher; made once."""
        target = self.out / "starts" / str(seed)
        text = f"{self.train['text']} --train-iters {self.train['text_iterations']} --seed {seed}"
        align = f"{self.train['align']} --train-iters {self.train['align_iterations']} --seed {seed}"
        settings = fingerprint(self.flags, text, align, self.train["vision_steps"], self.about, sources())
        if is_done(target, settings):
            return target
        aside = fresh(target.with_suffix(".incomplete"))
        flags = f"--stage text {text} --load {self.language_model / 'megatron'} {LOAD} --eval-interval 1000"
        flags += f" --save-llava {aside / 'built'} --eval-log {aside / 'text.jsonl'}"
        flags += f" --vision-steps {self.train['vision_steps']}"
        self.megatron(f"text-{seed}", flags, self.data, self.train["text_iterations"])
        flags = f"--stage llava {align} --load {aside / 'built'} {LOAD} --eval-interval 1000"
        flags += f" --save {aside / 'llava'} --save-interval 100000 --no-save-optim --no-save-rng"
        flags += f" --eval-log {aside / 'align.jsonl'}"
        self.megatron(f"align-{seed}", flags, self.data / "align", self.train["align_iterations"])
        tool = [sys.executable, str(ROOT / "tools" / "extract_teacher.py")]
        command = [*tool, "--source", str(aside / "built"), "--target", str(aside / "teacher")]
        run_command(command, self.logs / f"teacher-{seed}.log", title=f"teacher {seed}")
        finish(aside, target, settings)
        return target

    def run(self, run: Run) -> None:
        """One arm with one seed; nothing when it is there."""
        target, start = self.out / "runs" / run.name, self.start(run.seed)
        flags = f"--stage llava {self.train['llava']} --train-iters {run.iterations} --seed {run.seed} {LOAD}"
        flags += f" --load {start / 'llava'} --eval-interval {self.train['eval_interval']} {run.flags}"
        settings = fingerprint(self.flags, flags.replace(str(self.out), ""), self.about, sources())
        if is_done(target, settings):
            return
        aside = fresh(target.with_suffix(".incomplete"))
        flags += f" --eval-log {aside / 'heldout.jsonl'} --eval-losses {aside / 'losses.npz'}"
        before = time.perf_counter()
        flags = flags.replace("{teacher}", str(start / "teacher"))
        seconds = self.megatron(run.name, flags, self.data / "fresh" if run.is_fresh else self.data, run.iterations)
        shutil.copy(self.logs / f"{run.name}.log", aside / "log.txt")
        about = {
            "arm": run.arm,
            "seed": run.seed,
            "iterations": run.iterations,
            "fresh": run.is_fresh,
            "flags": run.flags,
        }
        about |= {"train_seconds": round(seconds, 1), "wall_seconds": round(time.perf_counter() - before, 1)}
        (aside / "about.json").write_text(json.dumps(about, indent=1))
        finish(aside, target, settings)

    def megatron(self, title: str, flags: str, data: Path, iterations: int = 0) -> float:
        """Run train.py; returns the seconds of its training steps."""
        length = self.about["align_length" if data.name == "align" else "text_length"]
        flags += f" --seq-length {length} --log-interval {self.train['eval_interval']}"
        launcher = ["-m", "regate_megatron", *([] if has_gpu() else ["--cpu"]), str(TRAIN), "--demo-data", str(data)]
        command = torchrun(self.config["ranks"], *launcher, *self.flags, *flags.split())
        return run_command(command, self.logs / f"{title}.log", title=title, iterations=iterations)

    def runs(self, names: list[str], num_seeds: int) -> list[Run]:
        """The runs of some arms, the first seed of each first."""
        arms = tomllib.loads((HERE / "arms.toml").read_text())
        if unknown := [name for name in names if name not in arms]:
            raise CommandError(f"--arms: given {', '.join(unknown)}, allowed {', '.join(arms)}")
        return [
            self.describe(name, arms[name], seed)
            for seed in range(1, num_seeds + 1)
            for name in names
            if seed <= arms[name].get("seeds", num_seeds)
        ]

    def describe(self, name: str, arm: dict, seed: int) -> Run:
        iterations = round(self.train["iterations"] * arm.get("length", 1.0))
        if not arm.get("plain"):  # ReGATE's own counts come with each log line
            iterations = -(-iterations // self.train["eval_interval"]) * self.train["eval_interval"]
        flags = ""
        if not arm.get("plain"):
            values = {"iterations": iterations, "nine_tenths": round(0.9 * iterations), "teacher": "{teacher}"}
            flags = f"{self.train['regate']} {arm.get('flags', '')}".format(**values)
            if "score random" not in flags and "score student" not in flags:
                flags += " --regate-teacher-load {teacher}"
        return Run(name, seed, flags, iterations, bool(arm.get("fresh")))


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def sources() -> list[str]:
    """What trains."""
    return [(TRAIN.parent / name).read_text() for name in ("train.py", "dataset.py", "tower.py")]


def fingerprint(*parts: object) -> str:
    """A hash of settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def is_done(folder: Path, settings: str) -> bool:
    """Whether a folder was finished with these settings."""
    marker = folder / "settings"
    return marker.exists() and marker.read_text() == settings


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(aside: Path, target: Path, settings: str) -> None:
    """Give a finished folder its name."""
    (aside / "settings").write_text(settings)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "cpu.toml", metavar="FILE")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "experiments", metavar="DIR")
    parser.add_argument("--arms", metavar="A,B", help="of arms.toml (default: the main ones)")
    parser.add_argument("--all", action="store_true", help="every arm, some with fewer seeds")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds per arm (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: the config's)")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", help="write the table and the pictures also into learning.md"
    )
    options = parser.parse_args()
    config, out = tomllib.loads(options.config.read_text()), options.out.resolve()
    arms = tomllib.loads((HERE / "arms.toml").read_text())
    main_arms = [name for name, arm in arms.items() if arm.get("main")]
    experiment = Experiment(config, out)
    try:
        if not options.report_only:
            experiment.prepare()
            runs = experiment.runs(options.arms.split(",") if options.arms else main_arms, options.seeds)
            if options.all:
                runs += experiment.runs([name for name in arms if name not in main_arms], options.seeds)
            run_all(experiment, runs, options.jobs or config["jobs"])
        results.write(out, options.docs)
    except (CommandError, weights.WeightsError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("experiment: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0


def run_all(experiment: Experiment, runs: list[Run], jobs: int) -> None:
    """All runs, `jobs` side by side; the first failure stops what has not begun."""
    for seed in sorted({run.seed for run in runs}):
        experiment.start(seed)
    began, lock, done = time.perf_counter(), threading.Lock(), 0

    def one(run: Run) -> None:
        nonlocal done
        experiment.run(run)
        with lock:
            done += 1
            print(f"{run.name}: {done} of {len(runs)} runs done in {time.perf_counter() - began:.0f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, run) for run in runs]
        try:
            for future in concurrent.futures.as_completed(waiting):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
