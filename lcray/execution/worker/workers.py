"""The calls that an analysis makes of its workers, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # torch, which commands that only read do without
    from lcray.execution.worker.descriptions import Description, Probe
    from lcray.execution.worker.fresh import Unexplained
    from lcray.execution.worker.reports import Outcome, SpanReport, View
    from lcray.planning.plan import Plan, Span
    from lcray.storage import Place
    from lcray.tables.reducing.reduce import Reduction


class Workers(Protocol):
    """Workers for one task and run: on Ray, or this process alone."""

    @property
    def size(self) -> int:
        """The number of workers, or teams."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def describe(self) -> Description:
        """The inputs that decide the numbers besides the settings."""

    def check(self) -> Unexplained:
        """Compare the model at points of the run with models newly built there."""

    def probe(self) -> Probe:
        """Evaluate the splits at the first checkpoint."""

    def losses(self, plan: Plan) -> dict[str, float]:
        """The mean loss of each split at the first checkpoint."""

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = ...,
    ) -> Outcome:
        """Compute and commit `spans`."""

    def reduce(self, out: Place) -> Reduction:
        """Merge the shards of `out` into tables."""
