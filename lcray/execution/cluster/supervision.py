"""The calling side of a Ray driver's process: a pool of workers that outlives its Ray.

The caller of lcray must not end because Ray ends, and should continue if possible. So the process
that is connected to Ray is another one (`lcray.execution.cluster.driver`). If lcray's own Ray ends,
another one is started, once; committed spans are kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import psutil
import ray

from lcray.errors import ClusterError, TaskError
from lcray.execution.cluster import private
from lcray.execution.cluster.actor import Shipment
from lcray.execution.cluster.connect import Address, connection, own_variables
from lcray.execution.cluster.pool import Pool
from lcray.execution.cluster.resources import Resources
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.process import end_session
from lcray.execution.worker.reports import Outcome, SpanReport, View
from lcray.execution.worker.workers import Workers
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.reducing.reduce import Reduction
from lcray.tasks.task import TaskSource

_TO_CONNECT = 25.0  # seconds for a cluster to answer
_TO_START = 300.0  # for lcray's own Ray, which gives up earlier by itself
_TO_END = 10.0

# Remove the current folder, which `-c` adds: its files must not come before the library.
_PROGRAM = """
import sys
del sys.path[0]
from multiprocessing.connection import Connection
wire = Connection(int(sys.argv[1]))
sys.path[:], sys.argv[:], name = wire.recv()
if name:
    __file__ = name
from lcray.execution.cluster.driver import serve
serve(wire)
"""


class _Lost(Exception):
    """The driver's process has ended, or its Ray has ended."""


@contextmanager
def workplace(
    resources: Resources, on_restart: Callable[[], None] = lambda: None
) -> Iterator[Callable[..., Workers]]:
    """A function that makes a pool: in this process if it is connected to Ray, else in another one.

    Args:
        resources: the resources to use.
        on_restart: called when lcray's own Ray has ended, before another one is started.

    Raises:
        UsageError: for an address of another kind.
        ClusterError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        with connection(resources):
            yield Pool
        return
    driver = _Driver(resources)
    try:
        driver.start()
        yield partial(SupervisedPool, driver, on_restart)
    finally:
        driver.end()


class _Driver:
    """The process that is connected to Ray; it may be started again once it has ended."""

    def __init__(self, resources: Resources) -> None:
        self.address = Address.of(resources)
        self._resources = resources
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: Connection | None = None
        self._folder: Path | None = None
        self._said: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process and have it connect to Ray.

        Raises:
            ClusterError: if it cannot.
        """
        variables = dict(os.environ)
        if self.address.is_own:
            self._folder = private.make_folder()
            variables.pop("RAY_ADDRESS", None)
            variables |= own_variables(self._resources, self._folder)
        self._said = _words(self._folder)
        self._wire, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(other.fileno())],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[other.fileno()],
                start_new_session=True,  # identifies its processes; and Ctrl-C stays here
            )
        main = getattr(sys.modules["__main__"], "__file__", None)
        try:
            self._send((sys.path, sys.argv, main))
            self._send((self._resources, self._folder))
            self._expect("connecting", None)
            self._expect("connected", _TO_START if self.address.is_own else _TO_CONNECT)
        except _Lost as lost:
            raise self.address.failed(str(lost)) from None

    def _expect(self, word: str, seconds: float | None) -> None:
        assert self._wire is not None
        if not self._wire.poll(seconds):
            raise _Lost(f"no answer within {seconds:.0f} s")
        try:
            found, content = self._receive()
        except _Lost as lost:
            raise _Lost(self._last_words() or str(lost)) from None
        if found == "error":
            kind, text = content
            raise kind(text)
        if found != word:
            raise _Lost(content)

    def call(
        self, order: Any, hear: Callable[[str, Any], None] = lambda word, content: None
    ) -> Any:
        """The answer to an order; `hear` gets the messages before it.

        Raises:
            LcrayError: from the call.
            _Lost: if the process or its Ray has ended.
        """
        self._send(order)
        while True:
            word, content = self._receive()
            if word == "answer":
                return content
            if word == "error":
                kind, text = content
                raise kind(text)
            if word == "lost":
                raise _Lost(content)
            hear(word, content)

    def _receive(self) -> tuple[str, Any]:
        assert self._wire is not None
        try:
            word, content = self._wire.recv()
        except (EOFError, OSError):
            raise _Lost("the process connected to it has ended") from None
        return word, content

    def _send(self, order: Any) -> None:
        """Send a message; if the process is gone, `_receive` reports it."""
        assert self._wire is not None
        with suppress(OSError):
            self._wire.send(order)

    def _last_words(self) -> str:
        """The last line that the process wrote, without Ray's own logs."""
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        found = [line.strip() for line in lines if line.strip() and "[state-dump]" not in line]
        return found[-1][:200] if found else ""

    def end(self) -> None:
        """End the process with everything it has started; does nothing if it never began."""
        process, folder = self._process, self._folder
        self._process = self._folder = None
        try:
            if process is not None and process.stdin is not None:
                process.stdin.close()
                _await_end(process.pid)
        finally:
            if process is not None:
                process.kill()
                if folder is not None:
                    end_session(process.pid)
                process.wait()
            for file in (self._wire, self._said):
                if file is not None:
                    file.close()
            private.remove(folder)


def _words(folder: Path | None) -> IO[bytes]:
    """A file for the output of the process; if none can be made, the output is lost."""
    try:
        return open(folder / "said", "w+b") if folder is not None else tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _await_end(pid: int) -> None:
    """Wait until a child has ended, without reaping it, so that its number is not reused."""
    deadline = time.monotonic() + _TO_END
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(pid)
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)


class SupervisedPool(Workers):
    """A `lcray.execution.cluster.pool.Pool` in another process; `workplace` makes it.

    Args:
        driver: that process.
        on_restart: see `workplace`.
        source: where workers find the task.
        run: the directory of checkpoints.
        settings: settings of the analysis.
        resources: the resources to use.
        **options: options of `lcray.execution.cluster.pool.Pool`.
    """

    def __init__(
        self,
        driver: _Driver,
        on_restart: Callable[[], None],
        source: TaskSource,
        run: str,
        settings: Settings,
        resources: Resources,
        **options: Any,
    ) -> None:
        self._driver, self._on_restart = driver, on_restart
        self._setup = (Shipment.pack(source), run, settings, resources), options
        self._restarted = False
        self._description: Description | None = None

    def __enter__(self) -> SupervisedPool:
        try:
            self._driver.call(self._setup)
        except _Lost as lost:
            self._restart(lost)
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: its workers end with the driver's process."""

    @property
    def size(self) -> int:  # type: ignore[override]
        """See `Workers`."""
        size: int = self.ask("size")
        return size

    def describe(self) -> Description:
        """See `Workers.describe`; asked once."""
        self._description = self._description or super().describe()
        return self._description

    def ask(self, method: str, *arguments: Any) -> Any:
        """See `Workers.ask`; any method of the pool in the other process."""
        while True:
            try:
                return self._driver.call((method, arguments))
            except _Lost as lost:
                self._restart(lost)

    def reduce(self, out: Place) -> Reduction:
        """See `Workers.reduce`."""
        found: Reduction = self.ask("reduce", out)
        return found

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = lambda view: None,
    ) -> Outcome:
        """See `Workers.run`."""
        outcome = Outcome()

        def hear(word: str, content: Any) -> None:
            if word == "view":
                on_tick(content)
            elif (span := content[0]) not in outcome.reports:
                outcome.reports[span] = content[1]
                on_done(span, content[1])

        while left := [span for span in spans if span not in outcome.reports]:
            try:
                outcome.failures |= self._driver.call(("run", (plan, left, out)), hear)
            except _Lost as lost:
                self._restart(lost)
            else:
                break
        return outcome

    def _restart(self, lost: _Lost) -> None:
        """Start lcray's own Ray again, once; its workers must match the earlier ones.

        Raises:
            ClusterError: if the Ray is not lcray's own, or the second time.
        """
        address = self._driver.address
        if self._restarted or not address.is_own:
            again = " again, after it was started anew," if self._restarted else ""
            raise ClusterError(
                f"{address}: has ended{again} in the middle of the analysis ({lost}); was one of "
                "its processes killed, or is the machine short of memory? Run the same command "
                "again to continue: committed spans are kept"
            ) from None
        self._restarted = True
        self._driver.end()
        self._on_restart()
        self._driver.start()
        try:
            self._driver.call(self._setup)
            known = self._description
            if known is not None and self._driver.call(("describe", ())) != known:
                raise TaskError(
                    "task: workers differ in model, data or device; splits() and model() must "
                    "give the same everywhere (seed what is random)"
                )
        except _Lost as again_lost:
            self._restart(again_lost)
