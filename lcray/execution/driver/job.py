"""The arguments of the verbs plan and analyze, and the plan and the record made from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from lcray.allocation.quadrature import get_rule
from lcray.checkpoints import CheckpointSeries, open_series
from lcray.errors import CheckpointError, OutputError, UsageError
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.follow import Growth
from lcray.execution.driver.progress import OnProgress, Progress
from lcray.execution.driver.record import (
    carrier_versions,
    check_plan_fits,
    check_plan_losses,
    check_same_losses,
    check_same_numbers,
    make_fingerprint,
    make_notes,
)
from lcray.execution.local import check_local
from lcray.execution.worker.state import folder_kept
from lcray.execution.worker.workers import AnyWorkers, Workers
from lcray.planning.costs import estimate, pass_seconds
from lcray.planning.make import extend_plan, following_length, make_plan
from lcray.planning.plan import Crew, Plan, Probed
from lcray.planning.saved import PlanReport
from lcray.settings import Settings
from lcray.storage import Place, PlaceLike, place
from lcray.tables.output import Output
from lcray.tables.record import Record
from lcray.tasks.task import Task, locate

_NO_LIMIT = 1 << 30  # workers, while the amount of work is unknown


class Job:
    """The arguments of both verbs, with all checks that need no worker."""

    def __init__(
        self,
        run: PlaceLike,
        task: str | Task,
        resources: Resources | None,
        steps: str | None,
        span_length: int | None,
        settings: Settings,
        known: Plan | None = None,
        growth: Growth | None = None,
    ) -> None:
        if span_length is not None and span_length < 1:
            raise UsageError(f"span-length {span_length}: must be at least 1")
        self.growth = growth
        self.series: CheckpointSeries = growth.first() if growth else open_series(run, steps)
        self.run = str(place(run).resolve())
        self.source = locate(task)
        with folder_kept():  # relative paths stay those of the caller
            self.source.load()
        self.resources = resources or Resources()
        if self.resources.local:
            check_local(self.resources)
        self.steps, self.span_length, self.settings = steps, span_length, settings
        self.threads = self.resources.threads or (known.threads if known else 1)
        if known and self.threads != known.threads:
            raise UsageError(
                f"threads {self.threads}: the plan says {known.threads}, and sums depend on it; "
                "leave --threads out"
            )

        team = self.resources.data_parallel
        self.partial_sums = known.partial_sums if known else settings.partial_sums or max(1, team)
        if team > self.partial_sums:
            raise UsageError(
                f"data-parallel {team}: there are {self.partial_sums} partial sums to share "
                f"({'the plan says so' if known else '--partial-sums'}); give at most as many"
            )

    def pool(self, make: Callable[..., AnyWorkers]) -> AnyWorkers:
        """The workers of the job; `make` starts them."""
        limit = len(self.series.steps) - 1 if self.growth is None else _NO_LIMIT
        return make(
            self.source,
            self.run,
            self.settings,
            self.resources,
            steps=self.steps,
            threads=self.threads,
            limit=limit,
            partial_sums=self.partial_sums,
        )

    def draft(self, pool: Workers) -> PlanReport:
        """A plan, with its costs, from the results of the workers' probe."""
        description, unexplained, probe = pool.describe(), pool.check(), pool.probe()
        drafted = make_plan(
            self.series.steps,
            self.settings,
            description.layers,
            probe.splits,
            crew=Crew(
                pool.size, self.resources.data_parallel, self.threads, description.device_kind
            ),
            probed=Probed(
                probe.seconds,
                probe.read_seconds,
                probe.fisher_seconds,
                probe.tuning.batch_size,
                probe.tuning.memory_format,
            ),
            partial_sums=self.partial_sums,
            span_length=self.span_length,
            grows=self.growth is not None,
        )
        team, seconds = self.resources.data_parallel, probe.seconds
        cost = estimate(
            drafted,
            pool.size,
            team=team,
            seconds=seconds,
            worker_bytes=probe.worker_bytes,
            fisher_seconds=probe.fisher_seconds,
        )
        return PlanReport(
            drafted,
            cost,
            pool.size * team,
            probe.resident,
            make_notes(description, drafted.settings, unexplained, self.series.late_start),
            team,
            get_rule(drafted.settings.rule).n_gradients * pass_seconds(drafted, team, seconds),
            description.fixed_batches,
            bool(self.resources.local),
        )

    def record(
        self,
        pool: Workers,
        out: Place,
        record: Record | None,
        given: Plan | None,
        tell: OnProgress,
    ) -> Record:
        """The record of the analysis, written to `out` before the first span."""
        description = pool.describe()
        if record is not None:
            check_same_numbers(out, record, description, description.layers)
            pool.check()
            check_same_losses(out, record, pool.losses(record.plan))
            return self._continued(out, record, given)
        if given is not None:
            check_plan_fits(given, description)
            late = self.series.late_start
            notes = make_notes(description, given.settings, pool.check(), late)
            check_plan_losses(given, pool.losses(given))
            self._check_steps(given)
            chosen = given
        else:
            tell(Progress("probe"))
            report = self.draft(pool)
            chosen, notes = report.plan, report.notes
        made = Record(
            self.run,
            self.source.reference,
            chosen,
            make_fingerprint(description),
            carrier_versions(),
            notes,
        )
        Output(out).write(made)
        return made

    def _continued(self, out: Place, record: Record, given: Plan | None) -> Record:
        if given is not None and given.spans != record.plan.spans[: len(given.spans)]:
            raise OutputError(f"{out}: was made by another plan; choose another --out")
        self._check_steps(record.plan)
        return record if given is not None else self._extended(out, record)

    def grown(self, out: Place, record: Record) -> Record:
        """`record` with the new spans of the run: complete spans, and at its end the last one."""
        assert self.growth is not None
        self.series = self.growth.look() or self.series
        return self._extended(out, record)

    def _extended(self, out: Place, record: Record) -> Record:
        steps: Sequence[int] = self.series.steps
        length = self.span_length
        if self.growth is not None:
            length = length or following_length(record.plan)
            if not self.growth.ended:
                known = bisect_right(steps, record.plan.steps[-1])
                steps = steps[: known + (len(steps) - known) // length * length]
        extended = extend_plan(record.plan, steps, length if self.growth else None)
        if extended is record.plan:
            return record
        made = replace(record, plan=extended)
        Output(out).write(made)
        return made

    def _check_steps(self, planned: Plan) -> None:
        gone = set(planned.steps) - set(self.series.steps)
        if gone:
            raise CheckpointError(
                f"{self.run}: {len(gone)} planned checkpoints are missing, the first at step "
                f"{min(gone)}; restore them, or analyze what there is into another output"
            )
