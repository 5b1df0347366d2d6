"""What is supported: one table of refusals, walked before step 0.

Each rule looks at one :class:`Setting`, the model and how it is to be trained, and says what is wrong, what is allowed,
why, and what to change. It looks at the model's config and at that of every module which has one of its own.
docs/support.md and ``doctor`` print the same table. :func:`hints` says what is allowed and still worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable

from regate_megatron.errors import refuse
from regate_megatron.support.decoder import DECODER_RULES
from regate_megatron.support.host_run import HostRun, folder_or_none
from regate_megatron.support.setting import Rule, Setting, setting_of_flags
from regate_megatron.support.training import TRAINING_RULES, hints, unproven

__all__ = [
    "RULES",
    "HostRun",
    "Rule",
    "Setting",
    "check_support",
    "folder_or_none",
    "hints",
    "refusals",
    "setting_of_flags",
    "unproven",
]

RULES = (*DECODER_RULES, *TRAINING_RULES)


def refusals(setting: Setting, which: Callable[[Rule], bool] = lambda rule: True) -> list[str]:
    """All that ReGATE cannot do of what is asked, one line each; a model class it does not know is the only one."""
    found = []
    for rule in filter(which, RULES):
        wrong = rule.given(setting)
        if wrong is not None:
            allowed = f"{rule.allowed} ({rule.why})"
            found.append(str(refuse(rule.what, given=wrong.given, allowed=allowed, change=wrong.change)))
            if rule.ends:
                break
    return found


def check_support(setting: Setting) -> tuple[bool, str]:
    """Whether ReGATE can run as asked: ``(True, "")`` or ``(False, one-line reason)``."""
    found = refusals(setting)
    return (False, found[0]) if found else (True, "")
