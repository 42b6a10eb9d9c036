"""The side of a Ray driver's process that calls it: a pool of workers that outlives its Ray.

Whoever calls lcray must not end because Ray does, and should go on where that is possible. So the
process that is connected to Ray is another one (`lcray.execution.cluster.driver`). If a Ray of
lcray's own ends, another one is started, once; what is committed is kept.
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
from types import TracebackType
from typing import IO, Any

import psutil
import ray

from lcray.errors import ClusterError, TaskError
from lcray.execution.cluster import private
from lcray.execution.cluster.actor import Shipment
from lcray.execution.cluster.connect import Address, connection, own_variables
from lcray.execution.cluster.driver import Orders
from lcray.execution.cluster.pool import Pool
from lcray.execution.cluster.resources import Resources
from lcray.execution.worker.fresh import Unexplained
from lcray.execution.worker.process import end_session
from lcray.execution.worker.reports import Outcome, SpanReport, View
from lcray.execution.worker.workspace import Description, Probe
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.reducing.reduce import Reduction
from lcray.tasks.task import TaskSource

_TO_CONNECT = 25.0  # seconds for a cluster to answer
_TO_START = 300.0  # for a Ray of one's own, which gives up by itself before
_TO_END = 10.0

# The folder of `-c`, the current one, goes: what lies there must not come before the library.
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
    """The driver's process has ended, or its Ray has."""


@contextmanager
def workplace(
    resources: Resources, on_restart: Callable[[], None] = lambda: None
) -> Iterator[Callable[..., Pool | SupervisedPool]]:
    """Gives what makes a pool: in this process if it is connected to a Ray, else in another one.

    Args:
        resources: what may be used.
        on_restart: called when a Ray of its own has ended, before another one is started.

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
        """Have it connect to Ray.

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
                start_new_session=True,  # by which its processes are known; and Ctrl-C is ours
            )
        main = getattr(sys.modules["__main__"], "__file__", None)
        try:
            self._send((sys.path, sys.argv, main))
            self._send(Orders(self._resources, self._folder))
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
        """What the answer to an order is; `hear` is told what comes before it.

        Raises:
            LcrayError: as the call raises it.
            _Lost: if the process has ended, or its Ray has.
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
        """Nobody to hear it is what `_receive` tells of."""
        assert self._wire is not None
        with suppress(OSError):
            self._wire.send(order)

    def _last_words(self) -> str:
        """The last line that the process wrote, but for Ray's own logs."""
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        found = [line.strip() for line in lines if line.strip() and "[state-dump]" not in line]
        return found[-1][:200] if found else ""

    def end(self) -> None:
        """End it with everything that it has started; does nothing where it never began."""
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
            if folder is not None:
                private.remove(folder)


def _words(folder: Path | None) -> IO[bytes]:
    """A file for what the process writes; where there is none, it is lost."""
    try:
        return open(folder / "said", "w+b") if folder is not None else tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _await_end(pid: int) -> None:
    """Wait until a child has ended, but leave it to be waited for: its number stays its own."""
    deadline = time.monotonic() + _TO_END
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(pid)
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)


class SupervisedPool:
    """A `lcray.execution.cluster.Pool` in another process: the same calls. Made by `workplace`.

    Args:
        driver: that process.
        on_restart: see `workplace`.
        source: where workers find the task.
        run: the directory of checkpoints.
        settings: of the analysis.
        resources: what may be used.
        **options: as of `lcray.execution.cluster.Pool`.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing: its workers end with the driver's process."""

    @property
    def size(self) -> int:
        """The number of workers, or teams of them, that were asked for, or fit."""
        size: int = self._ask("size")
        return size

    def describe(self) -> Description:
        """As `lcray.execution.cluster.Pool.describe`."""
        self._description = self._description or self._ask("describe")
        assert self._description is not None
        return self._description

    def check(self) -> Unexplained:
        """As `lcray.execution.cluster.Pool.check`."""
        found: Unexplained = self._ask("check")
        return found

    def probe(self) -> Probe:
        """As `lcray.execution.cluster.Pool.probe`."""
        probe: Probe = self._ask("probe")
        return probe

    def losses(self, plan: Plan) -> dict[str, float]:
        """As `lcray.execution.cluster.Pool.losses`."""
        losses: dict[str, float] = self._ask("losses", plan)
        return losses

    def reduce(self, out: Place, *, allow_missing: bool = False) -> Reduction:
        """As `lcray.execution.cluster.Pool.reduce`."""
        found: Reduction = self._ask("reduce", out, allow_missing=allow_missing)
        return found

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = lambda view: None,
    ) -> Outcome:
        """As `lcray.execution.cluster.Pool.run`."""
        outcome = Outcome()

        def hear(word: str, content: Any) -> None:
            if word == "view":
                on_tick(content)
            elif (span := content[0]) not in outcome.reports:
                outcome.reports[span] = content[1]
                on_done(span, content[1])

        while left := [span for span in spans if span not in outcome.reports]:
            try:
                outcome.failures |= self._driver.call(("run", (plan, left, out), {}), hear)
            except _Lost as lost:
                self._restart(lost)
            else:
                break
        return outcome

    def _ask(self, name: str, *arguments: Any, **options: Any) -> Any:
        while True:
            try:
                return self._driver.call((name, arguments, options))
            except _Lost as lost:
                self._restart(lost)

    def _restart(self, lost: _Lost) -> None:
        """Start another Ray of its own, once, with workers that find what the others found.

        Raises:
            ClusterError: for another Ray, or a second time.
        """
        address = self._driver.address
        if self._restarted or not address.is_own:
            again = " again, after it was started anew," if self._restarted else ""
            raise ClusterError(
                f"{address}: has ended{again} in the middle of the analysis ({lost}); was one of "
                "its processes killed, or is the machine short of memory? Run the same command "
                "again to go on: what is committed is kept"
            ) from None
        self._restarted = True
        self._driver.end()
        self._on_restart()
        self._driver.start()
        try:
            self._driver.call(self._setup)
            known = self._description
            if known is not None and self._driver.call(("describe", (), {})) != known:
                raise TaskError(
                    "task: workers differ in model, data or device; splits() and model() must "
                    "give the same everywhere (seed what is random)"
                )
        except _Lost as again_lost:
            self._restart(again_lost)


#: What makes no difference to an analysis.
Workers = Pool | SupervisedPool
