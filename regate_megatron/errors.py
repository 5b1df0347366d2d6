"""The one form of every refusal: what was given, what is allowed, what to change."""


class ReGateError(ValueError):
    """Something a user can mend. Its text is one line that starts with ``regate: ``.

    Args:
        everywhere: whether every rank raises the same, so that one of them is enough to say it.
    """

    def __init__(self, line: str, *, everywhere: bool = False) -> None:
        super().__init__(line)
        self.everywhere = everywhere


def refuse(what: str, *, given: object, allowed: str, change: str) -> ReGateError:
    """Build the refusal of ``what`` (an option or a property of the model); the caller raises it."""
    line = f"regate: {what}: given {given}; allowed {allowed}; change {change}"
    return ReGateError(" ".join(line.split()))
