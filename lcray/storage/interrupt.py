"""Work inside a library that no signal reaches: a thread does it, and is stopped when one comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 1.0  # seconds that stopped work may take to end
_left: list[threading.Event] = []  # set once the work that was left behind has ended after all


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or another signal that says so, while a library was at work."""


def interruptible(work: Callable[[], T], stop: Callable[[], object]) -> T:
    """What `work` gives; a signal that raises here, such as Ctrl-C, calls `stop` first.

    Python handles signals in its main thread, between two steps of its own: a library that works
    for hours in one call would hold them up for as long.

    Args:
        work: it runs in a thread of its own.
        stop: makes it end soon. Where it does not, the thread is left behind; see `left_behind`.

    Raises:
        Stopped: for KeyboardInterrupt.
    """
    done: Future[T] = Future()
    ended = threading.Event()  # a join that a signal breaks off takes the thread for ended

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        ended.set()

    threading.Thread(target=run, name="lcray-interruptible", daemon=True).start()
    try:
        ended.wait()
    except BaseException as error:
        stop()
        if not ended.wait(_PATIENCE):
            _left.append(ended)
        if isinstance(error, KeyboardInterrupt):
            raise Stopped from error
        raise
    return done.result()


def left_behind() -> bool:
    """Whether there is work that was stopped and goes on: what it uses cannot be closed."""
    return not all(ended.is_set() for ended in _left)
