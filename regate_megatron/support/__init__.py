"""What is supported: one table of refusals, walked before step 0.

Each rule looks at one :class:`Setting`, the model and how it is to be trained, and says what is wrong, what is allowed,
why, and what to change. The first rule that finds something refuses. README and ``doctor`` print the same table.
"""

from __future__ import annotations

from regate_megatron.errors import refuse
from regate_megatron.support.decoder import DECODER_RULES
from regate_megatron.support.setting import Rule, Setting, setting_of_flags
from regate_megatron.support.training import TRAINING_RULES

__all__ = ["RULES", "Rule", "Setting", "check_support", "setting_of_flags"]

RULES = (*DECODER_RULES, *TRAINING_RULES)


def check_support(setting: Setting, *, flags_only: bool = False) -> tuple[bool, str]:
    """Whether ReGATE can run as asked: ``(True, "")`` or ``(False, one-line reason)``."""
    for rule in RULES:
        given = rule.given(setting) if rule.in_flags or not flags_only else None
        if given is not None:
            error = refuse(rule.what, given=given, allowed=f"{rule.allowed} ({rule.why})", change=rule.change)
            return False, str(error)
    return True, ""
