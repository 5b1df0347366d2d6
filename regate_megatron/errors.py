"""The one form of every refusal: what was given, what is allowed, what to change."""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

# torchrun ends all ranks when it sees the first exit: the others wait until rank 0 has spoken.
_SECONDS_FOR_RANK_0 = 5


class ReGateError(ValueError):
    """Something a user can mend. Its text is one line that starts with ``regate: ``, or several such, one per fault.

    Args:
        everywhere: whether every rank raises the same, so that one of them is enough to say it.

    Attributes:
        field: the setting that was refused, where it is one of ReGATE's.
    """

    field: str | None = None

    def __init__(self, line: str, *, everywhere: bool = False) -> None:
        super().__init__(line)
        self.everywhere = everywhere


def refuse(what: str, *, given: object, allowed: str, change: str) -> ReGateError:
    """Build the refusal of ``what`` (an option or a property of the model); the caller raises it."""
    line = f"regate: {what}: given {given}; allowed {allowed}; change {change}"
    return ReGateError(" ".join(line.split()))


def nearest(given: str, names: Iterable[str], otherwise: str = "the spelling") -> str:
    """What to change in a word that is none of ``names``: it to the most alike of them, where one is alike."""
    near = difflib.get_close_matches(given, list(names), n=1)
    return f"it to {near[0]}" if near else otherwise


def given_to_argparse(error: argparse.ArgumentError) -> str:
    """What was given, where argparse refuses an option's value."""
    return "no value" if error.message == "expected one argument" else error.message


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """End the process with exit code 1 and one line on standard error when a refusal comes out of the block."""
    try:
        yield
    except ReGateError as error:
        say(error)
        leave()


def one_line_refusals_from_now_on() -> None:
    """The same for the rest of the process, where there is no block to put around it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ReGateError):
            sys.stderr = sys.__stderr__ or sys.stderr  # torch's hook holds back what is said here until we return
            say(error)
            leave()
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def leave() -> None:
    """End this process with exit code 1.

    With process groups alive at once: gloo's threads may abort a rank that tears its interpreter down, and its peers
    with it, before they have spoken.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


def say(error: ReGateError) -> None:
    """Print a refusal: rank 0 says what all ranks raise, any other is said by the rank that met it."""
    if error.everywhere and int(os.environ.get("RANK", 0)):
        time.sleep(_SECONDS_FOR_RANK_0)
    else:
        print(error, file=sys.stderr, flush=True)
