"""The settings of ReGATE, from which flags are made."""

from regate_megatron.config.options import BUDGETS, STUDENT_AS_TEACHER, WORDS, flag, shown_default
from regate_megatron.config.settings import ReGateConfig, require_settings

__all__ = ["BUDGETS", "STUDENT_AS_TEACHER", "WORDS", "ReGateConfig", "flag", "require_settings", "shown_default"]
