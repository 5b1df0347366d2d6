"""Tensors and ``torch.cuda`` without a GPU. Patched: names in ``torch``, ``torch.Tensor``, ``torch.cuda``."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
_LEGACY_TENSORS = ("Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "Bool")

_LIKE = ("empty_like", "full_like", "normal", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")


def to_cpu(device: Any) -> Any:
    """``device`` itself, or the CPU where it names a GPU (an index does)."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def install() -> None:
    """Patch torch. Functions imported by name before this call keep their old meaning."""
    _patch_factories()
    _patch_tensor()
    _patch_cuda_queries()
    _patch_cuda_random()
    _patch_cuda_streams()
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None


def _without_gpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _patch_factories() -> None:
    # This list is cached and compared by identity: `with torch.device(...)` must have it before the names change.
    for function in torch.utils._device._device_constructors():
        name = getattr(function, "__name__", "")
        if getattr(torch, name, None) is function:
            setattr(torch, name, _without_gpu(function))
    for name in _LIKE:  # not in that list, but they take a device
        setattr(torch, name, _without_gpu(getattr(torch, name)))

    context_init = torch.utils._device.DeviceContext.__init__
    torch.utils._device.DeviceContext.__init__ = lambda self, device: context_init(self, to_cpu(device))

    load = torch.load

    @functools.wraps(load)
    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, CPU if map_location is None else to_cpu(map_location), *args, **kwargs)

    torch.load = load_on_cpu


def _patch_tensor() -> None:
    tensor = torch.Tensor
    for name in ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(tensor, name, _without_gpu(getattr(tensor, name)))

    original_to, original_type = tensor.to, tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (to_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.")
        dtype = dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype
        return original_type(self, dtype, *args, **kwargs)

    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, device=None: self
    for kind in _LEGACY_TENSORS:
        setattr(torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))


def _patch_cuda_queries() -> None:
    cuda = torch.cuda
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = types.SimpleNamespace(
        name="CPU in place of a GPU", major=9, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "mem_get_info": (memory, memory),
    }
    answers |= dict.fromkeys(("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect"))
    answers |= dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated", "check_error"))
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    answers |= dict.fromkeys(("device_memory_used", "utilization", "temperature", "power_draw", "clock_rate"), 0)
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)
    cuda.device = lambda device=None: contextlib.nullcontext()
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.random._lazy_call = cuda._lazy_call
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)


def _patch_cuda_random() -> None:
    """One generator plays both parts, so whoever saves and restores cuda's state governs what the CPU draws."""
    generator = torch.default_generator
    torch.cuda.default_generators = (generator,)
    stand_ins = {
        "get_rng_state": lambda device=0: generator.get_state(),
        "set_rng_state": lambda new_state, device=0: generator.set_state(new_state),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda new_states: generator.set_state(new_states[0]),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)),
        "seed": generator.seed,
        "seed_all": generator.seed,
        "initial_seed": generator.initial_seed,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
        setattr(torch.cuda.random, name, stand_in)


class Event:
    """A point in time on the only stream there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.seconds - self.seconds) * 1e3

    def wait(self, stream: Any = None) -> None:
        """Nothing is ever pending on a CPU."""

    def synchronize(self) -> None:
        """Nothing is ever pending on a CPU."""

    def query(self) -> bool:
        return True


class Stream:
    """The only stream there is: work is done when it is issued."""

    device = CPU
    device_index = 0
    stream_id = 0
    cuda_stream = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes and ignores device and priority."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Streams of recent torch are context managers."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing is ever pending on a CPU."""

    def wait_event(self, event: Any) -> None:
        """Nothing is ever pending on a CPU."""

    def synchronize(self) -> None:
        """Nothing is ever pending on a CPU."""

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


def _patch_cuda_streams() -> None:
    cuda, only_stream = torch.cuda, Stream()
    cuda.Event, cuda.Stream, cuda.ExternalStream = Event, Stream, Stream
    cuda.current_stream = lambda device=None: only_stream
    cuda.default_stream = lambda device=None: only_stream
    cuda.set_stream = lambda stream: None
    cuda.stream = lambda stream=None: contextlib.nullcontext(stream)
