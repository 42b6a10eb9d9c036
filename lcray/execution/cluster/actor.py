"""The actor of a worker, and how a task is sent to it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.cloudpickle

from lcray.allocation.partial_sums import Seat
from lcray.errors import ClusterError, TaskError
from lcray.execution.cluster.calls import plainly
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.cluster.resources import Placement
from lcray.execution.cluster.team import Team
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.process import tune_process
from lcray.execution.worker.reports import SpanReport, report_of
from lcray.execution.worker.workbench import Share
from lcray.execution.worker.workspace import Workspace
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import place
from lcray.tables.output import Output
from lcray.tables.reducing.reduce import Reduction, merge
from lcray.tables.shards.commit import read_commit
from lcray.tasks.task import Task, TaskSource

_SECONDS_A_BEAT = 1.0


@dataclass(frozen=True)
class Shipment:
    """A task to send to a worker, with the folders that the driver imports from."""

    search_path: tuple[str, ...]
    pickled: bytes

    @classmethod
    def pack(cls, source: TaskSource) -> Shipment:
        """Pack a source.

        Raises:
            TaskError: if the object cannot be sent.
        """
        try:
            return cls(tuple(sys.path), ray.cloudpickle.dumps(source))
        except Exception as error:
            raise TaskError(
                f"task: cannot be sent to workers ({in_one_line(error)}); name it module:attribute"
            ) from error

    def load(self) -> Task:
        """Load the task in this process; see `unpack`.

        Raises:
            TaskError: if it cannot be loaded.
        """
        return self.unpack().load()

    def unpack(self) -> TaskSource:
        """Unpack the source; it is importable here if the driver's folders exist here as well."""
        known = set(sys.path)
        sys.path += [p for p in self.search_path if p not in known and os.path.exists(p)]
        try:
            source: TaskSource = ray.cloudpickle.loads(self.pickled)
        except Exception as error:
            raise TaskError(
                f"task: cannot be loaded on a worker ({in_one_line(error)}); is its code there too?"
            ) from error
        return source


class Worker:
    """The actor: a workspace, and the methods that the driver calls."""

    def __init__(self) -> None:
        self._device = "cuda" if ray.get_gpu_ids() else "cpu"
        tune_process(self._device)
        self._workspace: Workspace | None = None

    def set_up(
        self,
        shipped: Shipment,
        run: str,
        settings: Settings,
        steps: str | None,
        threads: int,
        partial_sums: int,
        placement: Placement,
        group: Any = None,
    ) -> Description:
        """Build model and data; meanwhile, the members of a lead's team do so too."""

        def work() -> Description:
            team = None
            if group is not None:
                team = Team(group, placement, (shipped.load, settings, threads, partial_sums))
            task = shipped.load()
            self._workspace = Workspace(
                task,
                run,
                settings,
                steps=steps,
                share=Share(self._device, threads, placement.memory, placement.sharers),
                partial_sums=partial_sums,
                seat=Seat(0, placement.team),
            )
            if team is not None:
                team.welcome(self._workspace.bench, task)
                self._workspace.lead(team)
            return self._workspace.describe()

        return plainly(work)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the workspace."""
        return plainly(lambda: getattr(self._ready(), method)(*arguments))

    def run_span(
        self, plan: Plan, span: Span, out: str, attempt: str, beats: Any = None
    ) -> SpanReport:
        """Compute and commit a span.

        Args:
            plan: the plan.
            span: one of its spans.
            out: the output directory.
            attempt: an id that no other attempt has.
            beats: the `Beats` to report progress to; None for no reports.
        """
        tell = (lambda done: None) if beats is None else _Telling(beats, attempt)

        def work() -> SpanReport:
            # An earlier call, whose answer was lost, or a copy may have committed this span.
            found = read_commit(place(out), span)
            if found is not None:
                return report_of(found)
            return self._ready().run(plan, span, place(out), attempt, tell)

        return plainly(work)

    def reduce(self, out: str) -> Reduction:
        """Merge the shards of `out` in this process, not in the driver."""
        return plainly(lambda: merge(Output(place(out))))

    def _ready(self) -> Workspace:
        if self._workspace is None:
            raise ClusterError("worker: was not set up")
        return self._workspace


class Beats:
    """Heartbeats: intervals done per attempt, in an actor of their own.

    Workers report without waiting for an answer, and the driver asks for the reports. So signs of
    life need no second thread in a worker, and a worker need not answer while it computes.
    """

    def __init__(self) -> None:
        self._done: dict[str, float] = {}

    def tell(self, attempt: str, done: float) -> None:
        """Record that an attempt has done so many intervals."""
        self._done[attempt] = done

    def take(self) -> dict[str, float]:
        """The reports since the last call."""
        found, self._done = self._done, {}
        return found


class _Telling:
    """Reports the progress of an attempt to `Beats`, at most once per second."""

    def __init__(self, beats: Any, attempt: str) -> None:
        self._beats, self._attempt = beats, attempt
        self._next = 0.0

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_A_BEAT
            self._beats.tell.remote(self._attempt, done)
