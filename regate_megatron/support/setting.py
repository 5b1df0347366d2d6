"""What the rules of support look at, and the form of a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from regate_megatron.config import ReGateConfig
from regate_megatron.support.host_run import HostRun


class Part(NamedTuple):
    """A module below the model with a config of its own: some models set a window or a kernel on single layers."""

    place: str
    config: Any


@dataclass(frozen=True)
class Setting:
    """What the rules look at.

    Attributes:
        chunks: this rank's language-model chunks, unwrapped.
        config: ReGATE's settings.
        run: what the host tells of its run.
        micro_batch_size: rows per microbatch; known for sure at the first step only.
        is_multimodal: whether the language model is part of a larger model.
        part: the module whose config the rules read instead of the model's.
    """

    chunks: list[Any]
    config: ReGateConfig
    run: HostRun = HostRun()
    micro_batch_size: int = 1
    is_multimodal: bool = False
    part: Part | None = None

    @property
    def model(self) -> Any:
        """The transformer config of the language model, or of one module of it."""
        return self.part.config if self.part else self.chunks[0].config

    @property
    def pattern(self) -> str | None:
        """The layer pattern of a HybridModel; None for a GPTModel."""
        return getattr(self.chunks[0], "hybrid_layer_pattern", None)

    def megatron_flag(self, name: str) -> Any:
        """A flag of Megatron-LM; None where it has no such flag, and in other hosts."""
        return getattr(self.run.flags, name, None)

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Every module of the language model with its name; none where there are only flags."""
        for chunk in self.chunks:
            if hasattr(chunk, "named_modules"):
                yield from chunk.named_modules()

    @cached_property
    def by_config(self) -> list[Setting]:
        """This setting as every config of the model's modules shows it, the model's own first."""
        from megatron.core.transformer import TransformerConfig

        known, settings = {id(self.model)}, [self]
        for place, module in self.modules():
            config = getattr(module, "config", None)
            if isinstance(config, TransformerConfig) and id(config) not in known:
                known.add(id(config))
                settings.append(dataclasses.replace(self, part=Part(place, config)))
        return settings


class Found(NamedTuple):
    """What a rule found: what was given, and what to change where that depends on how it was given."""

    given: str
    change: str | None = None


@dataclass(frozen=True)
class Rule:
    """One refusal.

    Attributes:
        find: what is wrong, as a word for the user or as :class:`Found`; None where nothing is.
        change: what to change, in general; a :class:`Found` says it for what was given.
        in_flags: whether the command line alone can tell.
        ends: whether the other rules cannot be asked once this one refuses.
    """

    what: str
    find: Callable[[Setting], Found | str | None]
    allowed: str
    change: str
    why: str
    in_flags: bool = True
    ends: bool = False

    def given(self, setting: Setting) -> Found | None:
        """What is wrong with the model, or with one of its modules that has a config of its own."""
        for one in setting.by_config:
            found = self.find(one)
            if found is not None:
                found = found if isinstance(found, Found) else Found(found)
                given = found.given + (f" in {one.part.place}" if one.part else "")
                return Found(given, found.change or self.change)
        return None


# Fields of Megatron's config whose flag has another name.
_FLAGS = {
    "fp4": "--fp4-format",
    "cpu_offloading": "--cpu-offloading-num-layers",
    "num_moe_experts": "--num-experts",
    "apply_rope_fusion": "--no-rope-fusion",
}


def flag_of(name: str) -> str:
    """Megatron's flag of a field of its config."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


@dataclass(frozen=True)
class Fields:
    """A rule's ``find``: the first of several fields of the model's config that is set."""

    names: tuple[str, ...]
    harmless: tuple[Any, ...] = (None, False, 0)

    def __init__(self, *names: str, harmless: tuple[Any, ...] = (None, False, 0)) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "harmless", harmless)

    def __call__(self, setting: Setting) -> Found | None:
        """What is set, and where to change it."""
        for name in self.names:
            value = getattr(setting.model, name, None)
            if value not in self.harmless:
                return Found(f"{name}={value}", leave_out(setting, name))
        return None


def leave_out(setting: Setting, name: str) -> str:
    """How to unset a field of Megatron's config: its flag, or the field where no flag can have set it."""
    if setting.part:
        return f"{name} of that module's config, or train it without --regate"
    return f"the command: leave {flag_of(name)} out ({name} of the model's config)"


class _FlagsAsModel:
    """Megatron's parsed flags, read as if they were the model's config."""

    _OTHER_NAMES = {"num_moe_experts": "num_experts", "fp8": "fp8_format", "fp4": "fp4_format"}

    def __init__(self, args: Any, fuses_rope: bool) -> None:
        self._args, self.apply_rope_fusion = args, fuses_rope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name if hasattr(self._args, name) else self._OTHER_NAMES.get(name, name))


def setting_of_flags(run: HostRun, config: ReGateConfig, script: str = "") -> Setting:
    """What Megatron's flags alone tell, before a model is built; for the rules that are ``in_flags``.

    Args:
        run: made of flags that are parsed, not yet validated by Megatron.
        script: its path. Megatron's examples/multimodal never fuse RoPE, whatever the flags say.
    """
    args = run.flags
    is_rope = args.position_embedding_type == "rope" or getattr(args, "use_rotary_position_embeddings", False)
    fuses = args.apply_rope_fusion and is_rope and Path(script).parent.name != "multimodal"
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    chunk = SimpleNamespace(
        config=_FlagsAsModel(args, fuses),
        position_embedding_type=args.position_embedding_type,
        hybrid_layer_pattern=pattern,
    )
    return Setting([chunk], config, run, run.micro_batch_size)
