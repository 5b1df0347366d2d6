"""run_pretrain.py with a fault, named by TEST_FAULT:

- ``slow``: the planner of replica 1 sleeps before it plans, and before it writes its part of a checkpoint;
- ``nan``: replica 1 has a teacher that answers NaN in step 4, and on every replica some of the student's losses look
  like NaN and infinity to the planner;
- ``planner``: in step 4 the planner of replica 1 fails before its first exchange;
- ``killed``: in step 4 replica 1 is gone as it begins to exchange the rows that were dealt;
- ``rss``: no fault; every 50 steps each rank notes its resident memory in TEST_RSS.<rank>.
"""

import os
import runpy
import signal
import time
from pathlib import Path

import torch

from regate_megatron.step import dealing, planner, session, state

_FAULT, _SECONDS = os.environ["TEST_FAULT"], 0.7


def slowly(inner):
    def wrapper(self, *args, **kwargs):
        if self.topology.dp_rank == 1:
            time.sleep(_SECONDS)
        return inner(self, *args, **kwargs)

    return wrapper


def nan_reference(inner):
    def plan(self, step):
        if step.number == 4 and self.topology.dp_rank == 1:
            step.reference = [torch.full_like(loss_T, torch.nan) for loss_T in step.reference]
        inner(self, step)

    return plan


def failing(inner):
    def plan(self, step):
        if step.number == 4 and self.topology.dp_rank == 1:
            raise IndexError("out of range")
        inner(self, step)

    return plan


def killed(inner):
    def exchange(self, step, *dealt):
        if step.number == 4 and self._topology.dp_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, step, *dealt)

    return exchange


def some_not_finite(inner):
    def learn(self, step, losses, norm_P):
        losses = [loss_BS.clone() for loss_BS in losses]
        for loss_BS in losses:
            loss_BS[:, 3], loss_BS[:, 7], loss_BS[:, 11] = torch.nan, torch.inf, 1e30
        inner(self, step, losses, norm_P)

    return learn


def note_memory(inner):
    def finish(self, counted=True):
        inner(self, counted)
        if self.steps_done % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(f"{os.environ['TEST_RSS']}.{os.environ['RANK']}", "a") as file:
                file.write(f"{os.getpid()} {self.steps_done} {pages * os.sysconf('SC_PAGE_SIZE')}\n")

    return finish


if _FAULT == "slow":
    planner.Planner.plan = slowly(planner.Planner.plan)
    state.StateSave._write = slowly(state.StateSave._write)
elif _FAULT == "nan":
    planner.Planner.plan = nan_reference(planner.Planner.plan)
    planner.Planner.learn = some_not_finite(planner.Planner.learn)
elif _FAULT == "planner":
    planner.Planner.plan = failing(planner.Planner.plan)
elif _FAULT == "killed":
    dealing.Dealing.exchange = killed(dealing.Dealing.exchange)
elif _FAULT == "rss":
    session.Session.finish = note_memory(session.Session.finish)

runpy.run_path(str(Path(__file__).with_name("run_pretrain.py")), run_name="__main__")
