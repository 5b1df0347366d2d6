"""What Megatron itself needs on a CPU.

Patched: ``WrappedTorchNorm.__new__``, the defaults of ``CLIPViTModel.__init__``, ``TENorm`` as the hybrid stack knows
it, ``DotProductAttention`` (see :mod:`.attention`; and so that multi-latent attention can tell it the sizes of heads),
what ``core.utils`` and ``llava_model`` ask of Transformer Engine, ``state_dict`` and ``load_state_dict`` of
``DistributedOptimizer``, ``compile_helpers``, the default of ``filesystem_async.get_write_results_queue`` and, where
there is a megatron.training, its ``initialize._warmup_jit_function`` and
``ArgumentGroupFactory._get_field_docstrings``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import os
import pathlib
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import types
from typing import Any

import torch

from regate_megatron.cpu.emulation import attention

HELPERS = "megatron.core.datasets.helpers_cpp"


def install() -> None:
    """Patch megatron.core, whichever copy comes first on the path."""
    _patch_norm()
    _patch_clip_norm()
    _patch_hybrid_norm()
    attention.install()
    _patch_transformer_engine()
    _patch_latent_attention()
    _patch_distributed_optimizer()
    _patch_compile_helpers()
    _patch_checkpoint_queue()
    _patch_warmup()
    _patch_argument_help()


def _patch_norm() -> None:
    """Patch the class, not its name: the layer specs imported the name."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    @functools.wraps(original)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False  # the refusal we lift
        plain.persist_layer_norm = False  # names a CUDA kernel; torch has one norm
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            # Each rank sees its part of the sequence: Megatron sums the gradients of parameters so marked.
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)


def _patch_clip_norm() -> None:
    """Without Transformer Engine the default is torch's own LayerNorm, which does not take Megatron's arguments."""
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    init = CLIPViTModel.__init__
    init.__defaults__ = tuple(WrappedTorchNorm if d is torch.nn.LayerNorm else d for d in init.__defaults__ or ())


def _patch_hybrid_norm() -> None:
    """The final norm of a hybrid stack is Transformer Engine's by name, whatever norms its spec asks for."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for name in ("megatron.core.models.hybrid.hybrid_block", "megatron.core.ssm.mamba_block"):
        with contextlib.suppress(ImportError):  # one of the two, by version
            module = importlib.import_module(name)
            if hasattr(module, "TENorm"):
                module.TENorm = WrappedTorchNorm


def _patch_transformer_engine() -> None:
    """Where Megatron asks Transformer Engine to cut packed rows, and where ``LLaVAModel`` insists on its attention."""
    from megatron.core import utils
    from megatron.core.models.multimodal import llava_model
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    tex = types.SimpleNamespace(thd_get_partitioned_indices=attention.partitioned_indices)
    if getattr(utils, "tex", tex) is None:
        utils.tex = tex
    if getattr(llava_model, "HAVE_TE", False):
        return
    stand_ins = {
        "HAVE_TE": True,
        "HAVE_TEX": True,
        "TEDotProductAttention": DotProductAttention,
        "is_te_min_version": lambda *args, **kwargs: True,
        "tex": tex,
    }
    for name, value in stand_ins.items():
        if hasattr(llava_model, name):
            setattr(llava_model, name, value)


def _patch_latent_attention() -> None:
    """Multi-latent attention tells its core attention the sizes of heads, which only Transformer Engine's is told."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__

    @functools.wraps(original)
    def init(
        self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)
        if v_channels is not None:  # what comes out per head; the scale, the one use of the other, is given
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = init


def _patch_distributed_optimizer() -> None:
    """Let Megatron's distributed optimizer resume with torch's Adam, which keeps a step per parameter.

    Megatron asks for that step before there is one, and after loading leaves one tensor for all parameters, each of
    which then advances it, or zero. The number it saved lies in the parameter groups.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    original_save, original_load = optimizer_class.state_dict, optimizer_class.load_state_dict

    @functools.wraps(original_save)
    def state_dict(self: Any) -> Any:
        adam = self.optimizer
        if isinstance(adam, torch.optim.Adam) and not adam.state:
            for parameter in (p for group in adam.param_groups for p in group["params"]):
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return original_save(self)

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        with torch.no_grad():  # fp32 shards are views of the parameters and are written in place
            original_load(self, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if "step" in group else ():
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    optimizer_class.state_dict, optimizer_class.load_state_dict = state_dict, load_state_dict


def _patch_compile_helpers() -> None:
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = compile_helpers


def _patch_checkpoint_queue() -> None:
    """Fork the process that holds the queue of written checkpoint files: a spawned one imports torch and Megatron anew,
    0.4 GB and seconds per rank. Megatron spawns for CUDA's sake."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue = inspect.unwrap(filesystem_async.get_write_results_queue)
    assert queue.__defaults__ == ("spawn",), "Megatron makes its queue in another way"
    queue.__defaults__ = ("fork",)


def _patch_warmup() -> None:
    """Nothing is compiled on a CPU. On a GPU the warm-up draws from cuda's generator; here it would move the only one
    there is, by an amount that depends on the layout, and with it the initial weights."""
    try:
        from megatron.training import initialize
    except ImportError:  # a bare megatron.core
        return
    initialize._warmup_jit_function = lambda *args, **kwargs: None


def _patch_argument_help() -> None:
    """Megatron parses the source of its settings for the help of its flags, each time it makes a parser: a tenth of a
    second, four times per rank. Once is enough, and ranks that are forked afterwards need none."""
    with contextlib.suppress(ImportError, AttributeError):  # megatron.training is missing, or before core 0.17
        from megatron.training.argument_utils import ArgumentGroupFactory

        found: dict[type, dict[str, str]] = {}
        original = ArgumentGroupFactory._get_field_docstrings

        @functools.wraps(original)
        def field_docstrings(self: Any, settings: type) -> dict[str, str]:
            if settings not in found:
                found[settings] = original(self, settings)
            return found[settings]

        ArgumentGroupFactory._get_field_docstrings = field_docstrings


def compile_helpers(folder: pathlib.Path | None = None) -> None:
    """Make Megatron's C++ dataset helpers importable: nothing to do in a wheel, compiled once in a checkout.

    Megatron's own Makefile asks whatever ``python3`` comes first on PATH; this asks the running Python. Several ranks
    may call it at once: each compiles aside and renames.

    Args:
        folder: where to build them, for this process and those it forks; None: in the checkout.

    Raises:
        RuntimeError: the helpers are missing and cannot be built; the text says why and what to do.
    """
    try:
        importlib.import_module(HELPERS)
        return
    except ImportError:
        pass
    datasets = importlib.import_module("megatron.core.datasets")
    source = pathlib.Path(datasets.__file__).parent
    if folder is not None:
        datasets.__path__.append(str(folder))
    elif not os.access(source, os.W_OK):
        raise RuntimeError(
            f"Megatron's dataset helpers are not compiled and {source} is not writable: compile them there"
        )
    _build(source / "helpers.cpp", (folder or source) / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}")
    importlib.invalidate_caches()
    importlib.import_module(HELPERS)


def _build(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError("Megatron's dataset helpers need pybind11 to be compiled: pip install pybind11") from error
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"Megatron's dataset helpers need a C++ compiler: {compiler[0]} was not found, set CXX")
    includes = {pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".helpers-") as aside:
        built = pathlib.Path(aside) / target.name
        flags = ["-O2", "-shared", "-std=c++17", "-fPIC", *(f"-I{path}" for path in sorted(includes))]
        result = subprocess.run([*compiler, *flags, str(source), "-o", str(built)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"Megatron's dataset helpers could not be compiled:\n{result.stderr}")
        os.replace(built, target)
