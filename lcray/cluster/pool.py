"""The driver's side: the loop that hands spans to workers, and replaces those that die."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from lcray.cluster.actor import Shipment, Worker
from lcray.cluster.connecting import in_one_line
from lcray.errors import ClusterError, LcrayError, TaskError
from lcray.planning import Plan, Settings, Span
from lcray.reduction import Reduction
from lcray.resources import Resources, place_workers
from lcray.span import Description, Outcome, Probe, SpanReport
from lcray.storage import Place
from lcray.task import TaskSource

Reference = Any  # of a result on the cluster: ray.ObjectRef

ATTEMPTS = 3  # a span: more would only repeat what fails


def _result(reference: Reference) -> Any:
    """What a call gave; an `LcrayError` of the worker's is raised as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LcrayError):
            raise type(cause)(str(cause)) from error
        raise ClusterError(f"worker: {in_one_line(cause)}") from error


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
        shipped = Shipment.pack(source)
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
                f"worker: died while {doing} ({in_one_line(error)}); is there enough memory?"
            ) from error

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
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
                reason, final = f"its worker died ({in_one_line(error)})", False
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

    def reduce(self, out: Place, *, allow_missing: bool = False) -> Reduction:
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
                f"reducing {out}: the worker died ({in_one_line(error)}); run lcray reduce {out}"
            ) from error
        return found

    def _start(self) -> None:
        actor: Any = ray.remote(Worker).options(**self._options).remote()
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
                    f"workers: keep dying while they set up ({in_one_line(error)}); is there "
                    "enough memory for model and data?"
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
