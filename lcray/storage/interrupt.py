"""Work inside a library that signals do not reach: a thread runs it, and a signal stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 1.0  # seconds that stopped work may take to end
_left: list[threading.Event] = []  # set once work that was left behind ends


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal of the same meaning, while a library was at work."""


def interruptible(work: Callable[[], T], stop: Callable[[], object]) -> T:
    """The result of `work`; a signal that raises here, such as Ctrl-C, calls `stop` first.

    Python handles signals in its main thread, between two of its own instructions: a library that
    works for hours in one call would delay them for hours.

    Args:
        work: runs in a thread of its own.
        stop: ends it soon. If the thread does not end, it is left behind; see `left_behind`.

    Raises:
        Stopped: in place of KeyboardInterrupt.
    """
    done: Future[T] = Future()
    ended = threading.Event()  # a join that a signal breaks marks a thread as ended

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
    """Whether stopped work is still running: what it uses cannot be closed."""
    return not all(ended.is_set() for ended in _left)
