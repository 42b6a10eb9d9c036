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
from lcray.execution.worker.descriptions import Description, Probe
from lcray.execution.worker.fresh import Unexplained
from lcray.execution.worker.reports import Outcome, SpanReport
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.reducing.reduce import Reduction
from lcray.tasks.task import TaskSource


class Pool:
    """Workers for one task and run; use as a context manager.

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
    def size(self) -> int:
        """The number of workers, or teams, that were asked for, or that fit."""
        return self._crew.wanted

    def __enter__(self) -> Pool:
        self._metrics = Metrics()
        self._crew.fill(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.dismiss()

    def describe(self) -> Description:
        """The description from the first ready worker.

        Raises:
            TaskError, CheckpointError, ClusterError: from setting up workers.
        """
        self._crew.await_one()
        assert self._crew.description is not None
        return self._crew.description

    def check(self) -> Unexplained:
        """Compare the model at points of the run with models newly built there, on one worker.

        Raises:
            TaskError: if they differ.
        """
        found: Unexplained = self._ask("check", "checking the model")
        return found

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
        try:
            return self._crew.ask(method, *arguments)
        except RayError as error:
            raise ClusterError(
                f"worker: died while {doing} ({in_one_line(error)}), and so did others; is there "
                "enough memory?"
            ) from error

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: OnTick = lambda view: None,
    ) -> Outcome:
        """Have free workers compute `spans`.

        A failed span is tried again, up to a cap; a broken task is not. The other spans continue.

        Args:
            plan: the plan.
            spans: the spans of the plan to compute, in the order in which to begin them.
            out: the output directory; workers run in another folder, so they get its absolute path.
            on_done: called for every span when it is done.
            on_tick: called about once per second with the progress of the others.
        """
        return Dispatch(
            self._crew, plan, spans, out.resolve(), on_done, on_tick, self._metrics
        ).run()

    def reduce(self, out: Place) -> Reduction:
        """Reduce `out` on a worker, so that the driver stays small.

        Raises:
            OutputError: from `lcray.tables.reducing.reduce.reduce`.
        """
        try:
            found: Reduction = self._crew.ask("reduce", str(out.resolve()))
        except RayError as error:
            raise ClusterError(
                f"reducing {out}: the workers died ({in_one_line(error)}); run lcray reduce {out}"
            ) from error
        return found
