"""Worker of the tests of ms-swift's Megatron trainer: its own ``train``, over models of mcore-bridge.

    python -m tests.frameworks.run_swift FOLDER [CASE …]

What is ms-swift's: the loop, the train step, the forward step with its batches and its loss, the callbacks. What is
not: arguments, data loaders, optimizer and checkpoints, which ask for packages of a GPU or a real model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.frameworks import mcore_on_cpu

mcore_on_cpu.install()

import torch

torch.jit.script = lambda function, *_, **__: function  # it cannot compile what the emulation has replaced

from swift.megatron.callbacks import megatron_callbacks_map
from swift.megatron.trainers import base
from swift.megatron.trainers.trainer import MegatronTrainer
from swift.megatron.trainers.utils import TrainerState

from regate_megatron import ReGateConfig
from regate_megatron.api import session_of
from regate_megatron.integrations import ms_swift
from tests.frameworks import run_mcore, tiny_mcore
from tests.frameworks.forked import run
from tests.frameworks.run_mcore import EACH, TEXT, Case, Layout, Rows

FAMILY, STEPS = "qwen25", 4
CASES = {
    "plain": Case(packs=True),
    "all kept": Case(packs=True, regate={"keep_ratio": 1.0, "teacher_load": "student"}),
    "regate": Case(packs=True, regate=EACH),
    "padded": Case(regate=EACH),
    "visual": Case(packs=True, regate=EACH | {"visual_keep_ratio": 0.5, "visual_score": "random"}),
    "resumed": Case(packs=True, regate=EACH),
}
GONE_ON_AT = 2


class Optimizer:
    """Plain gradient descent, with what the trainer asks of an optimizer."""

    def __init__(self, model: Any) -> None:
        self.model, self.scale_loss = model, None

    def zero_grad(self) -> None:
        pass

    def step(self) -> tuple[bool, float, None]:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.5 * parameter.main_grad
        return True, 0.0, None


class Trainer(MegatronTrainer):
    """ms-swift's trainer, given its parts."""

    def __init__(self, case: Case, folder: Path, name: str) -> None:
        given = {"task_type": "causal_lm", "tuner_type": "full", "padding_free": case.packs, "seq_length": TEXT}
        given |= {"micro_batch_size": 2, "global_batch_size": 4, "num_microbatches": 2, "train_iters": STEPS}
        given |= {"pipeline_model_parallel_size": 1, "context_parallel_size": 1, "cp_partition_mode": "zigzag"}
        given |= {"logging_steps": 2, "eval_iters": 0, "save_steps": GONE_ON_AT, "output_dir": str(folder / name)}
        given |= {"mcore_model": str(folder / "regate" / f"checkpoint-{GONE_ON_AT}") if name == "resumed" else None}
        off = ("is_multimodal", "overlap_grad_reduce", "overlap_param_gather", "nccl_comm_warmup", "enable_dft_loss")
        off += ("enable_channel_loss", "manual_gc", "async_save", "use_distributed_optimizer")
        given |= dict.fromkeys(off, False)
        given |= dict.fromkeys(("virtual_pipeline_model_parallel_size", "model", "eval_steps", "metric_for_best_model"))
        self.args = SimpleNamespace(**given)
        self.enable_routing_replay = False
        Layout().initialize()
        self.wrapped_models = run_mcore.build(folder / FAMILY, Layout())
        self.unwrapped_models = [self.wrapped_models[0].module]
        self.config = self.unwrapped_models[0].config
        self.optimizer = Optimizer(self.wrapped_models[0])
        self.opt_param_scheduler = SimpleNamespace(step=lambda increment: None)
        self.state, self.losses = TrainerState(max_steps=STEPS), []
        self.rows = Rows(tiny_mcore.FAMILIES[FAMILY], self.config.hf_config)
        if self.args.mcore_model:
            self.state.iteration = GONE_ON_AT
            self.wrapped_models[0].load_state_dict(torch.load(Path(self.args.mcore_model) / "weights.pt"))
        names = (["regate"] if case.regate is not None else []) + ["default_flow"]
        self.callbacks = [megatron_callbacks_map[one](self) for one in names]

    def _prepare_data_iterator(self, *_: Any, **__: Any) -> Any:
        packs = self.args.padding_free
        batches = [self.rows.batch([first, first + 1], packs) for first in (0, 2, 4, 6)]
        return map(dict, cycle(batches)), None  # the step writes into what it is given

    def _get_reported_learning_rate(self) -> None:
        return None

    def on_log(self, logs: Any, prefix: str = "") -> None:
        pass

    def _aggregated_metrics(self, metrics: Any, total_metrics: Any) -> None:
        total, count = torch.stack([one["loss"] for one in metrics]).sum(dim=0).tolist()
        self.losses.append(total / count)
        session = session_of(self.wrapped_models)
        self.totals = dataclasses.asdict(session.totals) if session else None

    def save_checkpoint(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.iteration}"
        folder.mkdir(parents=True)
        torch.save(self.wrapped_models[0].state_dict(), folder / "weights.pt")
        self.state.last_model_checkpoint = str(folder)


def train(name: str, case: Case, folder: Path) -> None:
    """One rank of a case."""
    torch.distributed.init_process_group("gloo")
    if case.regate is not None:
        chosen = case.regate | {"warmup_steps": 1, "cycle_steps": 100, "dense_steps": 1}
        ms_swift.install(ReGateConfig(**chosen, trace=str(folder / name / "trace")))
    (folder / name).mkdir(exist_ok=True)
    trainer, schedule = Trainer(case, folder, name), base.get_forward_backward_func
    trainer.train(None, None)
    found = {"losses": trainer.losses, "totals": trainer.totals}
    found |= {"restored": base.get_forward_backward_func is schedule and "train_step" not in vars(trainer)}
    found |= {"attached at the end": session_of(trainer.wrapped_models) is not None}
    (folder / f"{name}.json").write_text(json.dumps(found))


def main(folder: str, *names: str) -> int:
    """Run the cases; the number of those that failed."""
    here, failed = Path(folder), 0
    tiny_mcore.FAMILIES[FAMILY].write(here / FAMILY)
    for name in names or CASES:
        failed += not run(name, 1, here / f"{name}.log", partial(train, name, CASES[name], here))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
