"""Megatron on a machine without a GPU: CPU tensors and gloo in place of CUDA and NCCL, for tests, demos and dry runs.

Order of calls in a fresh process::

    from regate_megatron.cpu import emulation
    emulation.set_environment()                   # before the first import of torch; touches os.environ only
    sys.path.insert(0, checkout)                  # whichever ``megatron`` is to be used must come first by now
    emulation.install()                           # before Megatron is used; imports torch and megatron.core
    sys.argv[1:] = emulation.adjust_arguments(sys.argv[1:])   # a cluster's command line, made fit for a CPU

What :func:`install` does, for the rest of the process (there is no way back: it is meant for whole processes):

* ``devices``: every way to name a cuda device (``device=`` of the factory functions, ``.to``, ``.cuda``, ``new_*``,
  ``torch.load``, ``with torch.device``) means the CPU; pinned memory is plain memory; ``Tensor.type()`` still says
  ``torch.cuda.…`` because Megatron sorts gradients by that text. Streams, events, random state, memory figures and
  device properties of ``torch.cuda`` have stand-ins. Cuda's random state *is* the CPU generator, so Megatron's
  per-rank random states, dropout and recompute draw as they do on a GPU.
* ``groups``: every process group is gloo; options that only NCCL knows are dropped, and ranks may gather and scatter
  parts of different sizes, which NCCL can.
* ``megatron_core``: Megatron's torch norm accepts sequence parallelism, CLIPViT gets a norm that takes Megatron's
  arguments, the dataset helpers are compiled for the running Python and only when they are missing, the warm-up of
  compiled functions is left out (nothing is compiled), the distributed optimizer resumes with torch's Adam, and the
  local attention learns context parallelism and packed rows.
* Warnings that say "this is no GPU machine" are silenced, nothing else.

Why patched symbols and not a ``TorchFunctionMode``: ``backward`` is itself an overridable function, so it and every
forward recomputed in it run with the mode suspended; a mode is bound to one thread; and it makes each small operation
about five times slower. Patched symbols hold in every thread, in the autograd engine and in forked DataLoader workers,
and cost nothing where no device is named.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

_INSTALLED = False
# What is said on every machine without a GPU or Transformer Engine: beginnings of messages, as plain text.
_EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Only transformer-engine>=",
    "invalid escape sequence",
    "'pin_memory' argument is set as true",
)


def set_environment() -> None:
    """Set what torch reads while it is imported. Needs no torch, leaves CUDA_DEVICE_MAX_CONNECTIONS alone if set."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's fused functions would be compiled for minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run with and without a GPU in the machine
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists on it for tensor parallelism
    filters = [entry for entry in os.environ.get("PYTHONWARNINGS", "").split(",") if entry]
    filters += [f"ignore:{text}" for text in _EXPECTED_WARNINGS if f"ignore:{text}" not in filters]
    os.environ["PYTHONWARNINGS"] = ",".join(filters)  # for the processes Megatron spawns to save checkpoints


def install() -> None:
    """Put Megatron on the CPU for the rest of this process. Idempotent. Every rank calls it; no communication.

    Raises:
        ImportError: torch or megatron.core cannot be imported.
    """
    global _INSTALLED
    if _INSTALLED:
        return
    set_environment()
    with _no_collections():
        import torch._dynamo  # Megatron imports it in any case; it lists torch's functions by identity: before we patch

        from regate_megatron.cpu.emulation import devices, groups

        torch._dynamo.config.disable = True  # where torch was imported before the environment was set
        devices.install()
        groups.install()
        _silence()
        from regate_megatron.cpu.emulation import (
            megatron_core,  # imports megatron.core, which must see the patched torch
        )

        megatron_core.install()
    _INSTALLED = True


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """What is being imported is no garbage: looking for some again and again is a fifth of the time it takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave() -> None:
    """End the process groups together, where the script has not: gloo's threads may abort a rank that just exits."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def adjust_arguments(argv: list[str]) -> list[str]:
    """A Megatron-LM script's command line, as used on a cluster, with what a CPU needs; see :mod:`.arguments`."""
    from regate_megatron.cpu.emulation.arguments import adjust_arguments as adjust

    return adjust(argv)


def compile_helpers(folder: Path) -> None:
    """Make Megatron's dataset helpers importable here and in forked ranks, built in ``folder`` where they are missing.

    Raises:
        RuntimeError: they cannot be built; the text says why and what to do.
    """
    from regate_megatron.cpu.emulation import megatron_core

    megatron_core.compile_helpers(folder)


def _silence() -> None:
    """Leave out what is always said here and never helps; errors and everything else stay."""
    for text in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is (deprecated|a private function)")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # Megatron watches that nobody draws from the CPU generator where cuda's is meant: here they are one.
    shared = "CPU RNG state changed within GPU RNG context"
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: record.msg != shared)
