"""Ray: actors that hold a workspace each, and the loop that hands spans to them.

The only module that imports ray. The driver holds O(workers + spans) and never tensor data; actors
are stateless between spans, so that losing one costs the span it was at.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
import ray.cloudpickle
import torch
from ray.exceptions import RayError, RayTaskError

from lcray.errors import ClusterError, LcrayError, TaskError
from lcray.planning import Plan, Settings, Span
from lcray.process import environment, tune_process, worker_environment
from lcray.reduction import Reduction, merge
from lcray.resources import Placement, Resources, place_workers
from lcray.span import Description, Outcome, Probe, SpanReport, Workspace
from lcray.task import TaskSource

T = TypeVar("T")
Reference = Any  # of a result on the cluster: ray.ObjectRef

ATTEMPTS = 3  # a span: more would only repeat what fails
_OBJECT_STORE = 128 * 2**20  # bytes; nothing but plans goes through it


@contextmanager
def connection(resources: Resources) -> Iterator[None]:
    """A Ray to work on: the one there is, or one's own, which ends with the block.

    Raises:
        ClusterError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    options["logging_level"] = logging.ERROR
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    on_gpus = resources.gpus_per_worker != 0 and torch.cuda.device_count() > 0
    variables = worker_environment("cuda" if on_gpus else "cpu", resources.threads or 1)
    try:
        _check_reachable(address)
        # In a runtime environment of the actors they would cost Ray a start of processes anew.
        with environment(variables if address == "local" else {}):
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"Ray at {address!r}: cannot be reached ({_brief(error)}); is the cluster up?"
        ) from error
    try:
        # Ray takes SIGTERM for itself, and would abort; a handler that was there comes back.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise an OSError where nobody listens at ``host:port``: Ray would end the process."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@dataclass(frozen=True)
class _Shipment:
    """A task on its way to a worker, with the folders that the driver imports from."""

    search_path: tuple[str, ...]
    pickled: bytes

    @classmethod
    def pack(cls, source: TaskSource) -> _Shipment:
        """Pack a source.

        Raises:
            TaskError: if the object cannot be sent.
        """
        try:
            return cls(tuple(sys.path), ray.cloudpickle.dumps(source))
        except Exception as error:
            raise TaskError(
                f"task: cannot be sent to workers ({_brief(error)}); name it module:attribute"
            ) from error

    def unpack(self) -> TaskSource:
        """The source, importable here wherever the driver's folders exist here as well."""
        known = set(sys.path)
        sys.path += [p for p in self.search_path if p not in known and os.path.exists(p)]
        try:
            source: TaskSource = ray.cloudpickle.loads(self.pickled)
        except Exception as error:
            raise TaskError(
                f"task: cannot be loaded on a worker ({_brief(error)}); is its code there too?"
            ) from error
        return source


class _Worker:
    """The actor: a workspace, and the calls that the driver makes on it."""

    def __init__(self) -> None:
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        tune_process(self._device)
        self._workspace: Workspace | None = None

    def set_up(
        self,
        shipped: _Shipment,
        run: str,
        settings: Settings,
        steps: str | None,
        threads: int,
        placement: Placement,
    ) -> Description:
        """Build model and data."""

        def work() -> Description:
            task = shipped.unpack().load()
            self._workspace = Workspace(
                task,
                run,
                settings,
                steps=steps,
                device=self._device,
                threads=threads,
                memory=placement.memory,
                sharers=placement.sharers,
            )
            return self._workspace.describe()

        return _plainly(work)

    def probe(self) -> Probe:
        """Evaluate the splits at the first checkpoint."""
        return _plainly(self._ready().probe)

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint."""
        return _plainly(lambda: self._ready().losses(plan))

    def run_span(self, plan: Plan, span: Span, out: str, attempt: str) -> SpanReport:
        """Compute and commit a span."""
        return _plainly(lambda: self._ready().run(plan, span, Path(out), attempt))

    def reduce(self, out: str, allow_missing: bool) -> Reduction:
        """Merge the shards of `out`, here rather than in the driver."""
        return _plainly(lambda: merge(out, allow_missing=allow_missing))

    def _ready(self) -> Workspace:
        if self._workspace is None:
            raise ClusterError("worker: was not set up")
        return self._workspace


def _plainly(work: Callable[[], T]) -> T:
    """Run `work`; what it raises leaves the worker as an error that any process can read."""
    try:
        return work()
    except LcrayError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        raise ClusterError(f"worker: {_brief(error)}") from error


def _result(reference: Reference) -> Any:
    """What a call gave; an `LcrayError` of the worker's is raised as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LcrayError):
            raise type(cause)(str(cause)) from error
        raise ClusterError(f"worker: {_brief(cause)}") from error


class _Member(NamedTuple):
    """A worker as the driver sees it."""

    actor: Any


class Pool:
    """Workers for one task and run; use as a context manager.

    Args:
        source: where workers find the task.
        run: the directory of checkpoints.
        settings: of the analysis.
        resources: what may be used.
        steps: the range of steps to analyze, ``a:b``.
        threads: intra-op threads a worker.
        limit: the most workers that there is work for.
    """

    def __init__(
        self,
        source: TaskSource,
        run: str,
        settings: Settings,
        resources: Resources,
        *,
        steps: str | None,
        threads: int,
        limit: int,
    ) -> None:
        shipped = _Shipment.pack(source)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placed = place_workers(resources, nodes, limit)
        self._options = {"num_cpus": placed.cpus, "num_gpus": placed.gpus, "max_restarts": 0}
        self._count = placed.workers
        self._setup = (shipped, run, settings, steps, threads, placed)
        self._members: list[_Member] = []
        self._starting: dict[Reference, _Member] = {}
        self._description: Description | None = None
        self._died_early = 0  # in a row, while they set up

    @property
    def size(self) -> int:
        """The number of workers that were asked for."""
        return self._count

    def __enter__(self) -> Pool:
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for member in [*self._members, *self._starting.values()]:
            ray.kill(member.actor)

    def describe(self) -> Description:
        """What the first worker that is ready found.

        Raises:
            TaskError, CheckpointError, ClusterError: as setting up raises them.
        """
        while not self._members:
            ready, _ = ray.wait(list(self._starting), num_returns=1)
            self._welcome(ready[0])
        assert self._description is not None
        return self._description

    def probe(self) -> Probe:
        """Evaluate the splits at the first checkpoint, on one worker.

        Raises:
            TaskError: if the task breaks its contract.
        """
        probe: Probe = self._ask("probe", "probing")
        return probe

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint; cheaper than a probe.

        Raises:
            TaskError: if the task breaks its contract.
        """
        losses: dict[str, float] = self._ask("losses", "evaluating the first checkpoint", plan)
        return losses

    def _ask(self, method: str, doing: str, *arguments: Any) -> Any:
        self.describe()
        try:
            return _result(getattr(self._members[0].actor, method).remote(*arguments))
        except RayError as error:
            raise ClusterError(
                f"worker: died while {doing} ({_brief(error)}); is there enough memory?"
            ) from error

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Path,
        on_done: Callable[[Span, SpanReport], None],
    ) -> Outcome:
        """Have `spans` computed, each by whichever worker is free.

        A span that fails is tried again, up to a cap; a broken task is not. The rest goes on.
        """
        outcome = Outcome()
        shared = ray.put(plan)
        pending = deque(spans)
        attempts: dict[Span, int] = dict.fromkeys(spans, 0)
        idle = list(self._members)
        busy: dict[Reference, tuple[_Member, Span]] = {}
        while pending or busy:
            while idle and pending:
                member, span = idle.pop(), pending.popleft()
                attempts[span] += 1
                attempt = f"{attempts[span]}-{uuid.uuid4().hex[:12]}"
                busy[member.actor.run_span.remote(shared, span, str(out), attempt)] = member, span
            ready, _ = ray.wait([*busy, *self._starting], num_returns=1)
            if ready[0] in self._starting:
                idle += self._welcome(ready[0])
                continue
            member, span = busy.pop(ready[0])
            try:
                report: SpanReport = _result(ready[0])
            except RayError as error:
                self._replace(member)
                reason, final = f"its worker died ({_brief(error)})", False
            except LcrayError as error:
                idle.append(member)
                reason, final = str(error), isinstance(error, TaskError)
            else:
                idle.append(member)
                outcome.reports[span] = report
                on_done(span, report)
                continue
            if final or attempts[span] >= ATTEMPTS:
                outcome.failures[span] = reason
            else:
                pending.append(span)
        return outcome

    def reduce(self, out: Path, *, allow_missing: bool = False) -> Reduction:
        """Reduce `out` on a worker, so that the driver stays small.

        Raises:
            OutputError: as `lcray.reduction.reduce` raises it.
        """
        self.describe()
        try:
            call = self._members[0].actor.reduce.remote(str(out), allow_missing)
            found: Reduction = _result(call)
        except RayError as error:
            raise ClusterError(
                f"reducing {out}: the worker died ({_brief(error)}); run lcray reduce {out}"
            ) from error
        return found

    def _start(self) -> None:
        actor: Any = ray.remote(_Worker).options(**self._options).remote()
        self._starting[actor.set_up.remote(*self._setup)] = _Member(actor)

    def _welcome(self, reference: Reference) -> list[_Member]:
        """Take in a worker that has set up: it must have found what the others found."""
        member = self._starting.pop(reference)
        try:
            found: Description = _result(reference)
        except RayError as error:
            self._died_early += 1
            self._replace(member)
            if self._died_early > ATTEMPTS * self._count:
                raise ClusterError(
                    f"workers: keep dying while they set up ({_brief(error)}); is there enough "
                    "memory for model and data?"
                ) from error
            return []
        self._died_early = 0
        # The first one's, even where that worker is gone: others may have computed with the same.
        self._description = self._description or found
        if found != self._description:
            raise TaskError(
                "task: workers differ in model, data or device; splits() and model() must give "
                "the same everywhere (seed what is random)"
            )
        self._members.append(member)
        return [member]

    def _replace(self, member: _Member) -> None:
        if member in self._members:
            self._members.remove(member)
        ray.kill(member.actor)
        self._start()


def _brief(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"
