"""Signals while there is nothing to undo: the process ends at once.

An exception that a handler raises can be lost while modules load: what they run on the way may
take every exception for a missing package, or have no place to raise it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process, as after Ctrl-C."""
    os.write(2, b"lcray: interrupted\n")
    os._exit(128 + signal.SIGINT)


def leave_at_once() -> None:
    """Has signals end the process from now on, those that are not ignored."""
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Signals end the process within; before and after, they do what they did."""
    before = [signal.getsignal(number) for number in _NUMBERS]
    leave_at_once()
    try:
        yield
    finally:
        for number, handler in zip(_NUMBERS, before, strict=True):
            signal.signal(number, handler)
