"""The driver's side: a crew of workers, and the calls that an analysis makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from lcray.errors import ClusterError
from lcray.execution.cluster.actor import Shipment
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.cluster.dispatch import Dispatch, OnTick
from lcray.execution.cluster.metrics import Metrics
from lcray.execution.cluster.resources import Resources
from lcray.execution.cluster.workers import Crew
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.reports import Outcome, SpanReport
from lcray.execution.worker.workers import Workers
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.reducing.reduce import Reduction
from lcray.tasks.task import TaskSource

_DOING = {
    "check": "checking the model",
    "probe": "probing",
    "losses": "evaluating the first checkpoint",
}


class Pool(Workers):
    """Workers on Ray, for a process that is connected to it.

    Args:
        source: where workers find the task.
        run: the directory of checkpoints.
        settings: settings of the analysis.
        resources: the resources to use.
        steps: the range of steps to analyze, ``a:b``.
        threads: intra-op threads per worker.
        limit: the most workers, or teams, that can be kept busy.
        partial_sums: number of parts in which gradients are summed, before there is a plan.
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
        partial_sums: int = 1,
    ) -> None:
        setup = (Shipment.pack(source), run, settings, steps, threads, partial_sums)
        self._crew = Crew(setup, resources, limit)

    @property
    def size(self) -> int:  # type: ignore[override]
        """See `Workers`: it follows the nodes of the cluster."""
        return self._crew.wanted

    def __enter__(self) -> Pool:
        self._metrics = Metrics()
        self._crew.fill(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.dismiss()

    def describe(self) -> Description:
        """The description from the first ready worker; see `Workers.describe`."""
        self._crew.await_one()
        assert self._crew.description is not None
        return self._crew.description

    def ask(self, method: str, *arguments: Any) -> Any:
        """See `Workers.ask`."""
        try:
            return self._crew.ask("ask", method, *arguments)
        except RayError as error:
            raise ClusterError(
                f"worker: died while {_DOING[method]} ({in_one_line(error)}), and so did others; "
                "is there enough memory?"
            ) from error

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: OnTick = lambda view: None,
    ) -> Outcome:
        """See `Workers.run`; free workers take the spans."""
        # Workers run in another folder, so they get the absolute path of the output.
        return Dispatch(
            self._crew, plan, spans, out.resolve(), on_done, on_tick, self._metrics
        ).run()

    def reduce(self, out: Place) -> Reduction:
        """See `Workers.reduce`: on a worker, so that the driver stays small."""
        try:
            found: Reduction = self._crew.ask("reduce", str(out.resolve()))
        except RayError as error:
            raise ClusterError(
                f"reducing {out}: the workers died ({in_one_line(error)}); run lcray reduce {out}"
            ) from error
        return found
