"""Train a small vision-language model on real pretrained weights, dense and with ReGATE, and compare.

    python examples/experiments/run.py                     the main arms, three seeds each: half an hour on two free cores
    python examples/experiments/run.py --all               every arm: about four hours
    python examples/experiments/run.py --arms dense,regate --seeds 1
    python examples/experiments/run.py --positions 144     pictures of 144 visual positions, in a folder of their own
    python examples/experiments/run.py --clips             clips of eight frames of 16 positions, likewise
    python examples/experiments/run.py --photographs       photographs with human captions, likewise
    python examples/experiments/run.py --config examples/experiments/configs/h200.toml --all

Everything is Megatron's own training loop on examples/demo/train.py, through the launcher:

1. weights.py brings the language model, captions.py pictures with captions in its tokens;
2. per seed the language model reads the captions without pictures: the frozen teacher; a LLaVA is built around it with
   a projector from the seed and a vision tower that learns to name words until it can (tower.py), and learns from short
   captions to use them until it does (dense). Both are judged on held-out scenes; a seed that does not get there in the
   config's most steps ends the experiment with a line that says so;
3. arms.toml names the runs; all arms of a seed load the same saved start and see the same samples in the same order;
4. results.py writes results.csv, summary.md and the pictures; arms are compared seed by seed.

Finished runs are kept and not repeated while their settings stay the same: start it again after an interruption. What a
killed run had done is lost, no more. One process, with the config's environment: the same machine gives the same bits.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "demo")]

import captions  # noqa: E402
import photographs  # noqa: E402
import regimes  # noqa: E402
import results  # noqa: E402
import weights  # noqa: E402
from launch import CommandError, run_command, stop_all, torchrun  # noqa: E402

from regate_megatron.config import ReGateConfig, flag  # noqa: E402
from regate_megatron.errors import ReGateError  # noqa: E402

TRAIN = HERE.parent / "demo" / "train.py"
SEEDS = 3
LOAD = "--finetune --no-load-optim --no-load-rng"


@dataclass(frozen=True)
class Run:
    """One arm with one seed; `data` names its regime, `environment` holds its variables beside the config's."""

    arm: str
    seed: int
    flags: str
    iterations: int
    data: str
    environment: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


class Experiment:
    """The stages, in order; everything lies in `out`; `wrap` is a command that every training process runs under."""

    def __init__(self, config: dict, out: Path, wrap: str = "") -> None:
        self.config, self.train, self.out, self.wrap = config, config["train"], out, shlex.split(wrap)
        self.environment, self.sort = config["environment"], captions.SORTS[config["pictures"]["sort"]]
        self.lock = threading.Lock()
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    @property
    def regimes(self) -> list[str]:
        """What an arm's data can be; what says a caption again needs captions that can be told in another way."""
        again = set() if self.sort.long_caption else {"long", "mixed"}
        return [name for name in ("", "fresh", "long", *regimes.REGIMES) if name not in again]

    def prepare(self) -> None:
        """Weights, pictures and captions, the language model with their vocabulary in Megatron's format."""
        name = self.config["language_model"]
        language_model = weights.prepare(name, self.out / "weights" / Path(name).name)
        size, positions, sort = (self.config["pictures"][name] for name in ("size", "positions", "sort"))
        patch = patch_of(size, positions)
        self.data = captions.prepare(self.out / "data", language_model, **self.config["data"], size=size, sort=sort)
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
            *(["--bf16"] if multiplies_bf16() else []),
            *f"--img-h {size} --img-w {size} --patch-dim {patch} --frames {self.sort.frames}".split(),
            *f"--tokenizer-type NullTokenizer --vocab-size {self.about['vocabulary']} --ckpt-format torch_dist".split(),
        ]

    def start(self, seed: int) -> Path:
        """The LLaVA every run of a seed starts from, and its teacher; made once."""
        target, judged = self.out / "starts" / str(seed), self.sort.judged
        text = f"{self.train['text']} --train-iters {self.train['text_iterations']} --seed {seed}"
        text += f" --vision-until {self.train['vision_recall']} --vision-steps {self.train['vision_most_steps']}"
        text += f" --vision-kind {judged}"
        align = f"{self.train['align']} --train-iters {self.train['align_most_iterations']} --seed {seed}"
        align += f" --stop-at {judged}:{self.train['align_accuracy']} --eval-interval {self.train['align_interval']}"
        first = fingerprint(self.flags, text, self.about, self.environment, sources())
        settings = fingerprint(first, align)
        if is_done(target, settings):
            return target
        aside = target.with_suffix(".incomplete")
        if not is_done(aside / "built", first):  # else an interrupted start has come this far
            fresh(aside)
            flags = f"--stage text {text} --load {self.language_model / 'megatron'} {LOAD} --eval-interval 1000"
            flags += f" --save-llava {aside / 'built'} --eval-log {aside / 'text.jsonl'}"
            flags += f" --vision-data {self.data / 'align'}"  # more pictures
            self.megatron(f"text-{seed}", flags, self.data, self.train["text_iterations"], self.environment)
            (aside / "built" / "settings").write_text(first)
        for name in ("llava", "teacher"):
            shutil.rmtree(aside / name, ignore_errors=True)
        (aside / "align.jsonl").unlink(missing_ok=True)
        flags = f"--stage llava {align} --load {aside / 'built'} {LOAD}"
        flags += f" --save {aside / 'llava'} --save-interval 100000 --no-save-optim --no-save-rng"
        flags += f" --eval-log {aside / 'align.jsonl'}"
        most = self.train["align_most_iterations"]
        self.megatron(f"align-{seed}", flags, self.data / "align", most, self.environment)
        tool = [sys.executable, str(ROOT / "tools" / "extract_teacher.py")]
        command = [*tool, "--source", str(aside / "built"), "--target", str(aside / "teacher")]
        run_command(command, self.logs / f"teacher-{seed}.log", title=f"teacher {seed}")
        vision, end = (
            json.loads((aside / name).read_text().splitlines()[-1]) for name in ("text.jsonl", "align.jsonl")
        )
        about = vision | {"align_iterations": end["iteration"], "align_object": end["accuracy_by_kind"][judged - 1]}
        about |= {
            "weights": end["weights"],
            "data": self.about["content"],
            "environment": self.environment,
            **machine(),
        }
        (aside / "about.json").write_text(json.dumps(about, indent=1))
        print(
            f"start {seed}: the tower names {vision['vision_recall']:.1%} of held-out objects after "
            f"{vision['vision_steps']} steps; {about['align_object']:.1%} of object words right after "
            f"{end['iteration']} iterations of short captions; weights {end['weights']}",
            flush=True,
        )
        finish(aside, target, settings)
        return target

    def run(self, run: Run) -> None:
        """One arm with one seed; nothing when it is there."""
        target, start = self.out / "runs" / run.name, self.start(run.seed)
        flags = f"--stage llava {self.train['llava']} --train-iters {run.iterations} --seed {run.seed} {LOAD}"
        flags += f" --load {start / 'llava'} --eval-interval {self.train['eval_interval']} {run.flags}"
        weights_of_start = json.loads((start / "about.json").read_text())["weights"]
        variables = self.environment | run.environment
        own = ((HERE / "regimes.py").read_text(),) if run.data in regimes.REGIMES else ()
        settings = fingerprint(
            self.flags, flags.replace(str(self.out), ""), self.about, weights_of_start, variables, sources(), *own
        )
        if is_done(target, settings):
            return
        aside = fresh(target.with_suffix(".incomplete"))
        flags += f" --eval-log {aside / 'heldout.jsonl'} --eval-losses {aside / 'losses.npz'}"
        before = time.perf_counter()
        flags = flags.replace("{teacher}", str(start / "teacher"))
        data = self.data_of(run)
        seconds = self.megatron(run.name, flags, data, run.iterations, variables)
        shutil.copy(self.logs / f"{run.name}.log", aside / "log.txt")
        about = {
            "arm": run.arm,
            "seed": run.seed,
            "iterations": run.iterations,
            "data": data.relative_to(self.out).as_posix(),
            "flags": run.flags,
            "start": weights_of_start,
            **machine(),
        }
        about |= {"train_seconds": round(seconds, 1), "wall_seconds": round(time.perf_counter() - before, 1)}
        (aside / "about.json").write_text(json.dumps(about, indent=1))
        finish(aside, target, settings)

    def data_of(self, run: Run) -> Path:
        """The folder of a run's training data."""
        if run.data in regimes.REGIMES:
            with self.lock:  # several runs begin side by side
                regimes.prepare(self.data, run.data, self.config["data"]["seed"])
        return self.data / run.data

    def megatron(self, title: str, flags: str, data: Path, iterations: int, variables: dict[str, str]) -> float:
        """Run train.py; returns the seconds of its training steps."""
        with np.load(data / "train.npz") as arrays:
            length = arrays["tokens"].shape[1] - 1
            flags += " --dataloader-type external" * ("has_image" in arrays.files)
        interval = self.train["eval_interval" if data.name != "align" else "align_interval"]
        flags = f"--seq-length {length} --log-interval {interval} --repeatable {flags}"
        launcher = ["-m", "regate_megatron", *([] if has_gpu() else ["--cpu"]), str(TRAIN), "--demo-data", str(data)]
        command = [*self.wrap, *torchrun(self.config["ranks"], *launcher, *self.flags, *flags.split())]
        return run_command(command, self.logs / f"{title}.log", title=title, iterations=iterations, variables=variables)

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
        flags = [arm.get("flags", "")]
        if not arm.get("plain"):
            values = {"iterations": iterations, "nine_tenths": round(0.9 * iterations)}
            flags = [*regate_flags(name, self.config["regate"] | arm.get("regate", {}), values), *flags]
        environment = {variable: str(value) for variable, value in arm.get("environment", {}).items()}
        data = arm.get("data", "")
        if data not in self.regimes:
            raise CommandError(f"arm {name}: data: given {data}; allowed {', '.join(self.regimes[1:])}; change it")
        return Run(name, seed, " ".join(flags).strip(), iterations, data, environment)


def regate_flags(arm: str, settings: dict[str, Any], values: dict[str, int]) -> list[str]:
    """The command line of an arm's fields of ReGateConfig; a score that needs a teacher gets the start's.

    Raises:
        CommandError: no such field, or a value that the field does not take.
    """
    fields = {field.name: field for field in dataclasses.fields(ReGateConfig)}
    if unknown := sorted(settings.keys() - fields):
        raise CommandError(
            f"arm {arm}: given {', '.join(unknown)}; allowed {', '.join(fields)}; change its row in arms.toml"
        )
    settings = {
        name: int(value.format(**values)) if isinstance(value, str) and value.startswith("{") else value
        for name, value in settings.items()
    }
    try:
        if ReGateConfig(**settings).needs_teacher:
            settings.setdefault("teacher_load", "{teacher}")
    except ReGateError as error:
        raise CommandError(f"arm {arm}: {error}") from None
    flags = [flag("enabled")]
    for name, value in settings.items():
        if value is True:
            flags.append(flag(name))
        elif value is not False:
            flags += [flag(name), str(value)]
    return flags


def patch_of(size: int, positions: int) -> int:
    """Pixels of a patch's side when a picture, or a frame, of `size` x `size` becomes that many positions.

    Raises:
        CommandError: the picture cannot be cut so.
    """
    side = math.isqrt(positions)
    if side < 1 or side * side != positions or size % side or size % 2:
        allowed = [n * n for n in range(1, size + 1) if size % n == 0 and size // n > 1]
        raise CommandError(
            f"visual positions: given {positions} for pictures of {size} pixels; allowed "
            f"{', '.join(map(str, allowed))} of an even size; change --positions or [pictures] of the config"
        )
    return size // side


def machine() -> dict[str, str]:
    """What rounding may depend on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"processor": model, "torch": torch.__version__, "python": platform.python_version()}


def multiplies_bf16() -> bool:
    """Whether this x86 processor has instructions for products in bfloat16; without them these take longer."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu.read_text().split())


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


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep every other experiment out of a folder.

    Raises:
        CommandError: one is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"given {out}, where another experiment is at work; allowed a folder of its own; change --out, or wait"
            ) from None
        yield


def interrupt(*_: object) -> None:
    """A signal's handler: end as by ^C."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "cpu.toml", metavar="FILE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: out/experiments, -POSITIONS, -clips or -photographs behind it"
    )
    parser.add_argument(
        "--positions", type=int, metavar="N", help="visual positions of a picture (default: the config's): 16, 144 ..."
    )
    sorts = parser.add_mutually_exclusive_group()
    sorts.add_argument("--clips", action="store_true", help="clips of moving drawings in place of pictures")
    sorts.add_argument("--photographs", action="store_true", help="photographs with human captions in their place")
    parser.add_argument("--arms", metavar="A,B", help="of arms.toml (default: the main ones)")
    parser.add_argument("--all", action="store_true", help="every arm, some with fewer seeds")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds per arm (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: the config's)")
    parser.add_argument(
        "--wrap", default="", metavar="CMD", help="command that training runs under, such as 'nice -n 10'"
    )
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there")
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", help="write the table and the pictures also into learning.md"
    )
    options = parser.parse_args()
    config = tomllib.loads(options.config.read_text())
    sort = "clips" if options.clips else "photographs" if options.photographs else ""
    if options.photographs:
        config["pictures"] |= {"size": photographs.SIZE, "positions": photographs.POSITIONS}
    if options.positions:
        config["pictures"]["positions"] = options.positions
    config["pictures"]["sort"] = sort or "drawings"
    of = (f"-{options.positions}" if options.positions else "") + (f"-{sort}" if sort else "")
    name = f"experiments{of}"
    out = (options.out or ROOT / "out" / name).resolve()
    signal.signal(signal.SIGTERM, interrupt)
    arms = tomllib.loads((HERE / "arms.toml").read_text())
    main_arms = [name for name, arm in arms.items() if arm.get("main")]
    try:
        patch_of(config["pictures"]["size"], config["pictures"]["positions"])
        experiment = Experiment(config, out, options.wrap)
        runs = experiment.runs(options.arms.split(",") if options.arms else main_arms, options.seeds)
        if options.all:
            possible = [name for name, arm in arms.items() if arm.get("data", "") in experiment.regimes]
            runs += experiment.runs([name for name in possible if name not in main_arms], options.seeds)
        if not options.report_only:
            with held(out):
                experiment.prepare()
                run_all(experiment, runs, options.jobs or config["jobs"])
        results.write(out, options.docs, of)
    except (CommandError, weights.WeightsError, photographs.PhotographsError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("experiment: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0


def run_all(experiment: Experiment, runs: list[Run], jobs: int) -> None:
    """All runs, `jobs` side by side; the first failure stops what has not begun.

    A seed's start is made while the arms of the seed before it run.
    """
    began, lock, done = time.perf_counter(), threading.Lock(), 0
    starts: dict[int, concurrent.futures.Future] = {}

    def one(run: Run) -> None:
        nonlocal done
        starts[run.seed].result()  # submitted before: it is there, or at work beside this one
        experiment.run(run)
        with lock:
            done += 1
            print(f"{run.name}: {done} of {len(runs)} runs done in {time.perf_counter() - began:.0f} s", flush=True)

    seeds = list(dict.fromkeys(run.seed for run in runs))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for run in runs:
            for seed in seeds[: seeds.index(run.seed) + 2]:
                if seed not in starts:
                    starts[seed] = pool.submit(experiment.start, seed)
            waiting.append(pool.submit(one, run))
        try:
            for future in concurrent.futures.as_completed([*starts.values(), *waiting]):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, CommandError):  # an arm that failed lets the one beside it finish
                stop_all()
            raise


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
