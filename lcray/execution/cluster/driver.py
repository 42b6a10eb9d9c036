"""The process that is connected to Ray, and carries out the calls of its parent process.

When the node's raylet ends, Ray ends every process connected to it, without a message, and Python
cannot prevent it. This process can be started again.

It ends when its standard input ends, that is when the parent closes the other end or dies for any
reason. Every process of its own Ray ends with it.
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
from typing import TYPE_CHECKING, Any

import psutil

from lcray.errors import LcrayError
from lcray.execution.cluster import private
from lcray.execution.cluster.connect import connection, in_one_line
from lcray.execution.worker.process import end_session

if TYPE_CHECKING:
    from lcray.execution.cluster.pool import Pool

_PATIENCE = 5.0  # seconds for an orderly end
_LOOK = 0.25  # seconds between two checks of processes
_VITAL = ("gcs_server", "raylet")


def serve(wire: Connection) -> None:
    """Connect to Ray, and answer calls until the other side is gone.

    The other side first sends the resources to use, and the private folder of lcray's own Ray, None
    for another Ray. Each message to it is a pair: a word and its content. ``connecting`` and
    ``connected`` come first; a call is answered by ``answer``, ``error`` (an error of lcray) or
    ``lost`` (an error of Ray), after any number of ``done`` and ``view``.
    """
    os.set_inheritable(wire.fileno(), False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The other process decides how to react to a signal to both.
    signal.signal(signal.SIGTERM, lambda *_: None)
    side = _Side(wire)
    resources, folder = wire.recv()
    guard = _Guard(side, folder)
    guard.start()
    loading = threading.Thread(target=import_module, args=("torch",), daemon=True)
    loading.start()
    side.send("connecting")
    try:
        with connection(resources, folder):
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
    os._exit(0)  # the usual exit of Python and its libraries takes seconds


class _Side:
    """This end of the wire, for several threads. Messages to a closed end are dropped."""

    def __init__(self, wire: Connection) -> None:
        self._wire, self._lock = wire, threading.Lock()

    def send(self, word: str, content: Any = None) -> None:
        with self._lock, suppress(OSError):
            self._wire.send((word, content))

    def receive(self) -> Any:
        """Receive a message; raises EOFError if the other side is gone."""
        try:
            return self._wire.recv()
        except OSError as error:
            raise EOFError from error


def _answer(side: _Side) -> None:
    """Carry out calls: first the call that makes a pool, then calls of its methods."""
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


def _carry_out(side: _Side, pool: Pool, name: str, arguments: tuple[Any, ...]) -> None:
    if name == "size":
        side.send("answer", pool.size)
        return
    if name == "run":
        arguments += (
            lambda span, report: side.send("done", (span, report)),
            lambda view: side.send("view", view),
        )
    found = _result(side, lambda: getattr(pool, name)(*arguments))
    if found is not None:
        side.send("answer", found.failures if name == "run" else found)


def _result(side: _Side, work: Any) -> Any:
    """The result of `work`; None if it failed, after sending the error."""
    try:
        return work()
    except LcrayError as error:
        side.send("error", (type(error), str(error)))
    except Exception as error:
        side.send("lost", in_one_line(error))
    return None


class _Guard(threading.Thread):
    """Makes this process, and its Ray, end with the parent process.

    It also tells the parent when a vital part of Ray has ended: Ray itself may take minutes to
    notice.
    """

    def __init__(self, side: _Side, folder: Path | None) -> None:
        super().__init__(name="lcray-guard", daemon=True)
        self._side, self._folder, self._parent = side, folder, os.getppid()
        self._vital: list[psutil.Process] = []

    def watch_ray(self) -> None:
        """Watch the vital parts of a started Ray, if they are this process's own."""
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
        """Whether the other side is gone; waits a moment if it is not."""
        if select.select([sys.stdin], [], [], _LOOK)[0]:
            return True
        return os.getppid() != self._parent

    def _end_at_once(self) -> None:
        self.clean_up()
        os._exit(1)

    def clean_up(self) -> None:
        """End the remaining processes of lcray's own Ray, and remove its folder."""
        if self._folder is not None:
            end_session(os.getpid())
        private.remove(self._folder)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
