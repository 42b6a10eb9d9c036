"""The process that is connected to Ray, and carries out the calls of the one that started it.

Ray ends a process that is connected to it, without a word and past everything that Python could do,
as soon as the node's raylet is gone. Here that costs a process that can be started again.

It ends when the standard input does, that is when the process that started it closes the other
end or dies, however that happens; and with it ends every process of a Ray of its own.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from lcray.errors import LcrayError
from lcray.execution.cluster import private
from lcray.execution.cluster.connect import connection, in_one_line
from lcray.execution.cluster.resources import Resources
from lcray.execution.worker.process import end_session

if TYPE_CHECKING:
    from lcray.execution.cluster.pool import Pool

_PATIENCE = 5.0  # seconds for an orderly end
_LOOK = 0.25  # seconds between two looks at who lives
_VITAL = ("gcs_server", "raylet")


class Orders(NamedTuple):
    """What the process is to do.

    Attributes:
        resources: what may be used.
        folder: the private folder of a Ray of one's own; None where there is another Ray.
    """

    resources: Resources
    folder: Path | None


def serve(wire: Connection) -> None:
    """Connect to Ray, and answer calls until the other side is gone.

    What is sent is a pair: a word and what belongs to it. ``connecting`` and ``connected`` come
    first; a call is answered by ``answer``, ``error`` (of lcray's) or ``lost`` (Ray's), after any
    number of ``done`` and ``view``.
    """
    os.set_inheritable(wire.fileno(), False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The other process decides what a signal to both of them means.
    signal.signal(signal.SIGTERM, lambda *_: None)
    side = _Side(wire)
    orders: Orders = wire.recv()
    guard = _Guard(side, orders.folder)
    guard.start()
    loading = threading.Thread(target=import_module, args=("torch",), daemon=True)
    loading.start()
    side.send("connecting")
    try:
        with connection(orders.resources, orders.folder):
            guard.watch_ray()
            side.send("connected")
            loading.join()
            _answer(side)
    except LcrayError as error:
        side.send("error", (type(error), str(error)))
    except KeyboardInterrupt:
        pass
    finally:
        guard.clean_up()
    os._exit(0)  # what Python and its libraries would do yet takes seconds


class _Side:
    """This end of the wire, for several threads. What nobody hears is not said."""

    def __init__(self, wire: Connection) -> None:
        self._wire, self._lock = wire, threading.Lock()

    def send(self, word: str, content: Any = None) -> None:
        with self._lock, suppress(OSError):
            self._wire.send((word, content))

    def receive(self) -> Any:
        """Raises EOFError where the other side is gone."""
        try:
            return self._wire.recv()
        except OSError as error:
            raise EOFError from error


def _answer(side: _Side) -> None:
    """Carry calls out: first that for a pool, then those on it."""
    from lcray.execution.cluster.pool import Pool

    with suppress(EOFError):
        arguments, options = side.receive()
        pool = _result(side, lambda: Pool(*arguments, **options))
        if pool is None:
            return
        with pool:
            side.send("answer")
            while True:
                _carry_out(side, pool, *side.receive())


def _carry_out(
    side: _Side, pool: Pool, name: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    if name == "size":
        side.send("answer", pool.size)
        return
    if name == "run":
        options["on_done"] = lambda span, report: side.send("done", (span, report))
        options["on_tick"] = lambda view: side.send("view", view)
    found = _result(side, lambda: getattr(pool, name)(*arguments, **options))
    if found is not None:
        side.send("answer", found.failures if name == "run" else found)


def _result(side: _Side, work: Any) -> Any:
    """What `work` gives; None where it failed, which has been said."""
    try:
        return work()
    except LcrayError as error:
        side.send("error", (type(error), str(error)))
    except Exception as error:
        side.send("lost", in_one_line(error))
    return None


class _Guard(threading.Thread):
    """Sees to it that this process, and its Ray, end with the one that started it.

    It also tells that process when a part of Ray has ended that nothing works without: Ray itself
    may take minutes to notice.
    """

    def __init__(self, side: _Side, folder: Path | None) -> None:
        super().__init__(name="lcray-guard", daemon=True)
        self._side, self._folder, self._parent = side, folder, os.getppid()
        self._vital: list[psutil.Process] = []

    def watch_ray(self) -> None:
        """Ray has started: its vital parts, if they are this process's own, must not end."""
        if self._folder is not None:
            children = psutil.Process().children()
            self._vital = [child for child in children if child.name() in _VITAL]

    def run(self) -> None:
        while not self._left_alone():
            for process in self._vital:
                if _has_ended(process):
                    self._side.send("lost", f"its {process.name()} has ended")
                    self._end_at_once()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(_PATIENCE)
        self._end_at_once()

    def _left_alone(self) -> bool:
        """Whether nobody is on the other side; takes a moment where somebody is."""
        if select.select([sys.stdin], [], [], _LOOK)[0]:
            return True
        return os.getppid() != self._parent

    def _end_at_once(self) -> None:
        self.clean_up()
        os._exit(1)

    def clean_up(self) -> None:
        """End what is left of a Ray of its own, and remove its folder."""
        if self._folder is not None:
            end_session(os.getpid())
            private.remove(self._folder)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
