"""What is supported: one table of refusals, walked before step 0.

Each rule looks at one :class:`Setting`, the model and how it is to be trained, and says what is wrong, what is allowed,
why, and what to change. README and ``doctor`` print the same table.
"""

from __future__ import annotations

from collections.abc import Callable

from regate_megatron.errors import refuse
from regate_megatron.support.decoder import DECODER_RULES
from regate_megatron.support.setting import Rule, Setting, setting_of_flags
from regate_megatron.support.training import TRAINING_RULES

__all__ = ["RULES", "Rule", "Setting", "check_support", "refusals", "setting_of_flags"]

RULES = (*DECODER_RULES, *TRAINING_RULES)


def refusals(setting: Setting, which: Callable[[Rule], bool] = lambda rule: True) -> list[str]:
    """All that ReGATE cannot do of what is asked, one line each; a model class it does not know is the only one."""
    found = []
    for rule in filter(which, RULES):
        given = rule.given(setting)
        if given is not None:
            allowed = f"{rule.allowed} ({rule.why})"
            found.append(str(refuse(rule.what, given=given, allowed=allowed, change=rule.change)))
            if rule.ends:
                break
    return found


def check_support(setting: Setting) -> tuple[bool, str]:
    """Whether ReGATE can run as asked: ``(True, "")`` or ``(False, one-line reason)``."""
    found = refusals(setting)
    return (False, found[0]) if found else (True, "")
