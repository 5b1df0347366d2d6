"""What Megatron-Bridge's own settings tell before step 0; kept apart from Bridge, which needs a GPU's packages."""

from __future__ import annotations

from typing import Any

from regate_megatron.errors import ReGateError, refuse

# What would make groups that are not Megatron's; how to set each.
REFUSED = {
    "dist.use_decentralized_pg": "False",
}


def check_settings(settings: Any) -> None:
    """Refuse a setting of Bridge's ``ConfigContainer`` under which groups are its own.

    Raises:
        ReGateError: every rank has the same settings, so every rank raises.
    """
    for name, off in REFUSED.items():
        room, field = name.split(".")
        value = getattr(getattr(settings, room), field, None)
        if value:
            error: ReGateError = refuse(
                "Megatron-Bridge",
                given=f"{name}={value}",
                allowed="it off (groups of Bridge's own are not read in this version)",
                change=f"{name} to {off}",
            )
            error.everywhere = True
            raise error
