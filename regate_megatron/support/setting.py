"""What the rules of support look at, and the form of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from regate_megatron.config import ReGateConfig


@dataclass(frozen=True)
class Setting:
    """What the rules look at.

    Attributes:
        chunks: this rank's language-model chunks, unwrapped.
        config: ReGATE's settings.
        args: the framework's namespace; None outside Megatron-LM.
        micro_batch_size: rows per microbatch; known for sure at the first step only.
        is_multimodal: whether the language model is part of a larger model.
    """

    chunks: list[Any]
    config: ReGateConfig
    args: Any = None
    micro_batch_size: int = 1
    is_multimodal: bool = False

    @property
    def model(self) -> Any:
        """The transformer config of the language model."""
        return self.chunks[0].config

    @property
    def pattern(self) -> str | None:
        """The layer pattern of a HybridModel; None for a GPTModel."""
        return getattr(self.chunks[0], "hybrid_layer_pattern", None)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument of the framework, ``default`` where it has none."""
        return getattr(self.args, name, default)


@dataclass(frozen=True)
class Rule:
    """One refusal: ``given`` returns what is wrong, or None.

    Attributes:
        in_flags: the command line alone can tell.
        ends: the other rules cannot be asked once this one refuses.
    """

    what: str
    given: Callable[[Setting], Any]
    allowed: str
    change: str
    why: str
    in_flags: bool = True
    ends: bool = False


def field(name: str, harmless: tuple[Any, ...] = (None, False, 0)) -> Callable[[Setting], Any]:
    """A rule's ``given``: a field of the model's config that is set."""

    def given(setting: Setting) -> Any:
        value = getattr(setting.model, name, None)
        return None if value in harmless else f"{name}={value}"

    return given


def first_field(*names: str) -> Callable[[Setting], Any]:
    """A rule's ``given``: the first of several fields that is set."""
    return lambda setting: next((found for name in names if (found := field(name)(setting))), None)


class _FlagsAsModel:
    """Megatron's parsed flags, read as if they were the model's config."""

    _OTHER_NAMES = {"num_moe_experts": "num_experts", "fp8": "fp8_format", "fp4": "fp4_format"}

    def __init__(self, args: Any, fuses_rope: bool) -> None:
        self._args, self.apply_rope_fusion = args, fuses_rope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name if hasattr(self._args, name) else self._OTHER_NAMES.get(name, name))


def setting_of_flags(args: Any, config: ReGateConfig, script: str = "") -> Setting:
    """What Megatron's flags alone tell, before a model is built; for the rules that are ``in_flags``.

    Args:
        args: parsed, not yet validated by Megatron.
        script: its path. Megatron's examples/multimodal never fuse RoPE, whatever the flags say.
    """
    is_rope = args.position_embedding_type == "rope" or getattr(args, "use_rotary_position_embeddings", False)
    fuses = args.apply_rope_fusion and is_rope and Path(script).parent.name != "multimodal"
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    chunk = SimpleNamespace(
        config=_FlagsAsModel(args, fuses),
        position_embedding_type=args.position_embedding_type,
        hybrid_layer_pattern=pattern,
    )
    return Setting([chunk], config, args, args.micro_batch_size or 1)
