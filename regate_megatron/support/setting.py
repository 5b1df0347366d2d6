"""What the rules of support look at, and the form of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """One refusal: ``given`` returns what is wrong, or None; ``in_flags``: the command line alone can tell."""

    what: str
    given: Callable[[Setting], Any]
    allowed: str
    change: str
    why: str
    in_flags: bool = True


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

    _OTHER_NAMES = {"num_moe_experts": "num_experts"}

    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, self._OTHER_NAMES.get(name, name))


def setting_of_flags(args: Any, config: ReGateConfig) -> Setting:
    """What Megatron's flags alone tell, before a model is built; for ``check_support(…, flags_only=True)``."""
    pattern = getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
    chunk = SimpleNamespace(
        config=_FlagsAsModel(args),
        position_embedding_type=args.position_embedding_type,
        hybrid_layer_pattern=pattern,
    )
    return Setting([chunk], config, args)
