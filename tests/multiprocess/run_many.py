"""Many small runs for the price of one start: imports Megatron once, then forks the ranks of every run asked for.

Reads one JSON object per line from standard input:

- "ranks", "env", "timeout_s"; "log": rank r writes LOG.r;
- "argv" of ``python -m regate_megatron --cpu``, or of the script itself when "plain";
- "kill": none, or [path, seconds]: so long after the path appears all ranks are killed, with what they have forked.

Answers each with one line: {"codes": [exit code per rank, negative for signals]}.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from regate_megatron import emulation

emulation.set_environment()
emulation.install()

import megatron.training  # noqa: F401
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401

from regate_megatron.__main__ import main as launch
from regate_megatron.integrations import megatron_checkpoints, megatron_lm  # noqa: F401


def become_rank(job: dict, rank: int, port: int) -> None:
    """In a forked child: be one rank, and end."""
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **job.get("env", {})}
    os.environ |= {name: str(value) for name, value in place.items()}
    code = 1
    try:
        script, *flags = job["argv"]
        if job.get("plain"):
            sys.argv = [script, *emulation.adjust_arguments(flags)]
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
            emulation.leave()
        else:
            launch(["--cpu", script, *flags])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> list[int]:
    """Fork the ranks, wait for them; when one fails the others are killed, and all of them at the time limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            os.setsid()  # a group of its own: the processes it forks to write checkpoints are killed with it
            become_rank(job, rank, port)
        ranks.append(child)
    codes: dict[int, int] = {}
    now = time.monotonic
    ends = [now() + job.get("timeout_s", 240)]
    watched, seconds = job.get("kill") or (None, 0)
    while len(codes) < len(ranks):
        for child in ranks:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if status:
                        ends.append(now() + 10)  # the others may say why
        if watched and Path(watched).exists():
            ends.append(now() + seconds)
            watched = None
        if now() > min(ends):
            kill(ranks)
        time.sleep(0.001 if job.get("kill") else 0.02)
    kill(ranks)  # what a rank has forked may outlive it: Megatron's queue of written checkpoint files does
    return [codes[child] for child in ranks]


def kill(ranks: list[int]) -> None:
    """End the ranks and whatever they have forked."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps({"codes": run(json.loads(line))}), flush=True)
