"""What is supported: one table of refusals, walked before step 0.

Each rule looks at one :class:`Setting`, the model and how it is to be trained, and says what is wrong, what is allowed,
why, and what to change. It looks at the model's config and at that of every module which has one of its own. The first
rule that finds something refuses. README and ``doctor`` print the same table. :func:`hints` says what is allowed and
still worth knowing.
"""

from __future__ import annotations

from regate_megatron.errors import refuse
from regate_megatron.support.decoder import DECODER_RULES
from regate_megatron.support.setting import Rule, Setting, setting_of_flags
from regate_megatron.support.training import TRAINING_RULES, hints

__all__ = ["RULES", "Rule", "Setting", "check_support", "hints", "setting_of_flags"]

RULES = (*DECODER_RULES, *TRAINING_RULES)


def check_support(setting: Setting, *, flags_only: bool = False) -> tuple[bool, str]:
    """Whether ReGATE can run as asked: ``(True, "")`` or ``(False, one-line reason)``."""
    for rule in RULES:
        found = rule.given(setting) if rule.in_flags or not flags_only else None
        if found is not None:
            allowed = f"{rule.allowed} ({rule.why})"
            return False, str(refuse(rule.what, given=found.given, allowed=allowed, change=found.change))
    return True, ""
