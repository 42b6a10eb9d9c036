"""The calls that an analysis makes of its workers, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch, which commands that only read do without
    from lcray.execution.worker.descriptions import Description, Probe
    from lcray.execution.worker.fresh import Unexplained
    from lcray.execution.worker.reports import Outcome, SpanReport, View
    from lcray.planning.plan import Plan, Span
    from lcray.storage import Place
    from lcray.tables.reducing.reduce import Reduction

AnyWorkers = TypeVar("AnyWorkers", bound="Workers")


class Workers(ABC):
    """Workers for one task and run: on Ray, or this process alone. Use as a context manager.

    Attributes:
        size: the number of workers, or teams, that were asked for, or that fit.
    """

    size: int

    def __enter__(self: AnyWorkers) -> AnyWorkers:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """End the workers."""

    @abstractmethod
    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the workspace of one worker.

        Raises:
            LcrayError: from the method.
            ClusterError: if workers are lost.
        """

    def describe(self) -> Description:
        """The inputs that decide the numbers besides the settings.

        Raises:
            TaskError, CheckpointError, ClusterError: from setting up workers.
        """
        found: Description = self.ask("describe")
        return found

    def check(self) -> Unexplained:
        """Compare the model at points of the run with models newly built there.

        Raises:
            TaskError: if they differ.
        """
        found: Unexplained = self.ask("check")
        return found

    def probe(self) -> Probe:
        """Evaluate the splits at the first checkpoint.

        Raises:
            TaskError: if the task breaks its contract.
        """
        found: Probe = self.ask("probe")
        return found

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint; cheaper than a probe.

        Raises:
            TaskError: if the task breaks its contract.
        """
        found: dict[str, float] = self.ask("losses", plan)
        return found

    @abstractmethod
    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = lambda view: None,
    ) -> Outcome:
        """Compute and commit `spans`.

        A failed span is tried again, up to a cap; a broken task is not. The other spans continue.

        Args:
            plan: the plan.
            spans: the spans of the plan to compute, in the order in which to begin them.
            out: the output directory.
            on_done: called for every span when it is done.
            on_tick: called about once per second with the progress of the others.

        Raises:
            DisagreementError: if numbers differ from the plan's.
            ClusterError: if workers keep dying.
        """

    @abstractmethod
    def reduce(self, out: Place) -> Reduction:
        """Merge the shards of `out` into tables.

        Raises:
            OutputError: from `lcray.tables.reducing.reduce.reduce`.
        """
