"""Computing the spans of a plan that are missing, with progress and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lcray.errors import LcrayError
from lcray.execution.driver.status import StatusFile
from lcray.execution.worker.reports import SpanReport, View, report_of
from lcray.execution.worker.workers import Workers
from lcray.planning.plan import Plan, Span
from lcray.storage import Place
from lcray.tables.shards.commit import Commit, each_commit


@dataclass(frozen=True)
class Progress:
    """Progress of an analysis.

    Attributes:
        phase: ``start``, ``probe``, ``spans`` or ``reduce``; ``restart`` if lcray's own Ray has
            ended and another one is started; ``local`` instead of ``start`` in this process.
        done: number of committed intervals.
        total: number of all intervals.
        running: number of intervals done in spans that are not committed yet.
        seconds_left: at the rate so far, or else by the probe; None if unknown. Of ``local``: the
            time for all gradients, if that is why no workers are started.
    """

    phase: str
    done: int = 0
    total: int = 0
    running: float = 0.0
    seconds_left: float | None = None


OnProgress = Callable[[Progress], None]


class Computation:
    """Has the spans of an output computed that are not committed yet; more may be added.

    Args:
        pool: the workers.
        out: the output directory.
        plan: the plan.
        file: the status file.
        check: raises an error if another driver has taken over the output.
        tell: called with the progress.
        pace: seconds per interval for all workers together, from the probe; None if unknown.
        counts: whether an existing commit still counts.

    Raises:
        OutputError: as `counts` does.
    """

    def __init__(
        self,
        pool: Workers,
        out: Place,
        plan: Plan,
        file: StatusFile,
        check: Callable[[], None],
        tell: OnProgress,
        pace: float | None = None,
        counts: Callable[[Commit], bool] = lambda commit: True,
    ) -> None:
        self.failures: dict[Span, str] = {}
        self.cause: LcrayError | None = None  # of the first failure, if it is known
        self._pool, self._out, self._plan = pool, out, plan
        self._file, self._check, self._tell = file, check, tell
        done: set[str] = set()

        def reports() -> Iterator[tuple[Span, SpanReport]]:
            for span, commit in each_commit(out, plan.spans):
                if not counts(commit):
                    continue
                done.add(span.name)
                yield span, report_of(commit)

        count = file.resume(reports())
        self._todo = [span for span in plan.spans if span.name not in done]
        left = None if pace is None else (plan.n_intervals - count) * pace
        tell(Progress("spans", count, plan.n_intervals, seconds_left=left))

    def extend(self, plan: Plan) -> None:
        """Add the new spans of a longer plan."""
        self._todo += plan.spans[len(self._plan.spans) :]
        self._plan = plan
        self._file.extend(plan)

    def run(self) -> None:
        """Have the spans computed that are not yet, except those that failed."""
        todo, self._todo = self._todo, []
        if todo:
            outcome = self._pool.run(self._plan, todo, self._out, self._done, self._view)
            self.failures |= outcome.failures
            self.cause = self.cause or outcome.cause
            self._file.view(View(0, (), self.failures))

    def _view(self, view: View) -> None:
        self._file.view(replace(view, failures=self.failures | view.failures))
        self._report()

    def _done(self, span: Span, report: SpanReport) -> None:
        self._check()
        self._file.done(span, report)
        self._report()

    def _report(self) -> None:
        said = self._file.latest
        running = sum(held.done for held in said.running)
        self._tell(
            Progress("spans", said.intervals_done, said.intervals, running, said.seconds_left)
        )


_AGAIN = "run the same command again to retry"


def explain(out: Place, failures: dict[Span, str], done: int) -> str:
    """One line about spans that were given up; `done` intervals are committed."""
    lost = sum(span.n_intervals for span in failures)
    names = ", ".join(f"{span.first}-{span.last}" for span in list(failures)[:6])
    more = ", …" if len(failures) > 6 else ""
    span, reason = next(iter(failures.items()))
    kept = f"the rest is committed: {_AGAIN}, or lcray reduce {out} --allow-missing for the tables"
    return (
        f"{out}: {lost} {'interval is' if lost == 1 else 'intervals are'} missing (steps "
        f"{names}{more}): {span.first}-{span.last}: {reason}; "
        + (f"{kept} of what there is" if done else f"nothing is committed: {_AGAIN}")
    )
