"""The public verbs: plan an analysis, and run it to its tables."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcray.allocation.quadrature import get_rule
from lcray.checkpoints import CheckpointSeries, open_series
from lcray.errors import CheckpointError, IncompleteError, OutputError, UsageError
from lcray.execution.cluster import Workers, workplace
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.follow import SECONDS_A_LOOK, Growth
from lcray.execution.driver.progress import Computation, OnProgress, Progress, explain
from lcray.execution.driver.record import (
    Record,
    carrier_versions,
    check_plan_fits,
    check_plan_losses,
    check_same_losses,
    check_same_numbers,
    check_same_settings,
    make_fingerprint,
    make_notes,
    read_record,
)
from lcray.execution.driver.repair import take_back
from lcray.execution.driver.revisit import Revisit, revisit_last
from lcray.execution.driver.status import StatusFile
from lcray.planning.costs import estimate, pass_seconds, seconds_an_interval
from lcray.planning.make import extend_plan, following_length, make_plan, make_settings
from lcray.planning.plan import Plan
from lcray.planning.saved import PlanReport, load_plan
from lcray.settings import Settings
from lcray.storage import Place, PlaceLike, place
from lcray.storage.files import writing
from lcray.storage.lock import Lock, locked
from lcray.tables.reading.results import Results, open_output
from lcray.tables.shards.writer import remove_strays
from lcray.tasks.task import Task, locate

__all__ = ["PlanReport", "Progress", "analyze", "load_plan", "plan"]

_NO_LIMIT = 1 << 30  # workers, while nobody knows how much work there will be


def plan(
    run: PlaceLike,
    task: str | Task,
    *,
    resources: Resources | None = None,
    steps: str | None = None,
    span_length: int | None = None,
    **options: Any,
) -> PlanReport:
    """Plan an analysis, and measure what a gradient costs; nothing is written.

    Args:
        run: the directory of checkpoints, or its URI.
        task: ``package.module:attribute``, ``path/file.py:attribute``, or a `Task`.
        resources: workers and where they run.
        steps: the range of steps to analyze, ``a:b``.
        span_length: intervals a span; chosen by their duration and number otherwise.
        **options: fields of `Settings`.

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        ClusterError: if Ray fails.
    """
    job = _Job(run, task, resources, steps, span_length, make_settings(options))
    with workplace(job.resources) as make, job.pool(make) as pool:
        return job.draft(pool)


def analyze(
    run: PlaceLike,
    task: str | Task,
    out: PlaceLike,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    resources: Resources | None = None,
    steps: str | None = None,
    span_length: int | None = None,
    repair: bool = False,
    follow: bool = False,
    idle: float | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Results:
    """Allocate the loss changes of a run to its parameters, into the tables of `out`.

    Running it again with the same arguments resumes: committed spans are skipped, and steps that
    the run has gained are added.

    Args:
        run: the directory of checkpoints, or its URI.
        task: ``package.module:attribute``, ``path/file.py:attribute``, or a `Task`.
        out: the output directory, or its URI; new, or of the same analysis.
        plan: a plan, or the file of one, instead of `steps`, `span_length` and options.
        resources: workers and where they run.
        steps: the range of steps to analyze, ``a:b``.
        span_length: intervals a span; chosen by their duration and number otherwise.
        repair: read what is committed, and compute anew what is damaged, or was computed from
            checkpoints that have changed since.
        follow: go on while training still writes, until the run has ended (see `idle`). Give
            `window` then: by default it is chosen by the steps there are at first.
        idle: seconds without a new checkpoint after which a run that is followed has ended; None
            for 600, or for ever where a recorder keeps a ``run.json``, which says when it ends.
        on_progress: called whenever there is something to tell.
        **options: fields of `Settings`: ``rule``, ``refine``, ``rtol``, ``batch_norm`` …

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        OutputError: if `out` cannot be written, or holds something else, or was computed from
            other checkpoints than the run has now.
        IncompleteError: if spans failed; the message says why, and what is committed is kept.
        ClusterError: if Ray fails.
    """
    tell = on_progress or (lambda progress: None)
    if idle is not None and not follow:
        raise UsageError(f"idle {idle:g}: is for --follow")
    given = _given(plan, follow=follow, others=bool(options or steps or span_length))
    settings = given.settings if given else make_settings(options)
    # Of a plan the first checkpoint is as well, as when it was made.
    steps = f"{given.steps[0]}:" if given else steps
    path = place(out)
    record = read_record(path)
    if record is not None:
        check_same_settings(path, record, settings)
    growth = Growth(run, steps, idle) if follow else None
    known = record.plan if record else given
    job = _Job(run, task, resources, steps, span_length, settings, known, growth)
    _make_folder(path)
    with locked(path) as lock:
        if read_record(path) != record:
            raise OutputError(f"{path}: has just changed; run the same command again")
        if repair and record is not None:
            take_back(path, record.plan.spans)
        _work(job, path, record, given, lock, tell, repair)
    return open_output(path)


def _given(
    plan: Plan | str | os.PathLike[str] | None, *, follow: bool, others: bool
) -> Plan | None:
    """The plan that was given, if one was; it leaves nothing for other options to say."""
    given = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
    if given is not None and others:
        raise UsageError("a plan decides settings, steps and spans: leave the other options out")
    if given is not None and follow:
        raise UsageError("a plan has its steps: --follow is for analyses without --plan")
    return given


def _make_folder(path: Place) -> None:
    if isinstance(path, Path):
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


def _work(
    job: _Job,
    path: Place,
    known: Record | None,
    given: Plan | None,
    lock: Lock,
    tell: OnProgress,
    repair: bool,
) -> None:
    """All that takes workers, by the record that is known or a new one."""
    tell(Progress("start"))

    def restarting() -> None:
        tell(Progress("restart"))

    with workplace(job.resources, restarting) as make, job.pool(make) as pool:
        record = job.record(pool, path, known, given, tell)
        with StatusFile(path, record.plan, lock.holds) as file:
            _compute(job, pool, path, record, file, lock, tell, repair)


def _compute(
    job: _Job,
    pool: Workers,
    out: Place,
    record: Record,
    file: StatusFile,
    lock: Lock,
    tell: OnProgress,
    repair: bool,
) -> None:
    """Compute the spans that are not committed, while there are more, and merge all into tables."""
    pace = seconds_an_interval(record.plan, job.resources.data_parallel)
    pace = None if pace is None else pace / pool.size
    revisit = Revisit(out, job.series, repair=repair)
    computation = Computation(pool, out, record.plan, file, lock.check, tell, pace, revisit.counts)
    revisit.check()
    computation.run()
    while job.growth is not None and not job.growth.ended:
        file.state("following")
        lock.check()
        longer = job.grown(out, record)
        if longer is record:
            time.sleep(SECONDS_A_LOOK)
            continue
        revisit_last(out, job.series, record.plan)
        record = longer
        computation.extend(record.plan)
        file.state("running")
        computation.run()
    if computation.failures:
        raise IncompleteError(explain(out, computation.failures, file.latest.intervals_done))
    lock.check()
    remove_strays(out, record.plan.spans)
    total = record.plan.n_intervals
    tell(Progress("reduce", total, total))
    file.state("reducing")
    pool.reduce(out)


class _Job:
    """The arguments of both verbs, checked as far as that goes without a worker."""

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
        self.source.load()
        self.resources = resources or Resources()
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

    def pool(self, make: Callable[..., Workers]) -> Workers:
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
        description, unexplained, probe = pool.describe(), pool.check(), pool.probe()
        drafted = make_plan(
            self.series.steps,
            self.settings,
            description.layers,
            probe.splits,
            workers=pool.size,
            team=self.resources.data_parallel,
            partial_sums=self.partial_sums,
            span_length=self.span_length,
            threads=self.threads,
            device_kind=description.device_kind,
            batch_size=probe.tuning.batch_size,
            memory_format=probe.tuning.memory_format,
            seconds=probe.seconds,
            read_seconds=probe.read_seconds,
            fisher_seconds=probe.fisher_seconds,
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
        )

    def record(
        self,
        pool: Workers,
        out: Place,
        record: Record | None,
        given: Plan | None,
        tell: OnProgress,
    ) -> Record:
        """The record to work by, written to `out` before the first span."""
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
        made.write(out)
        return made

    def _continued(self, out: Place, record: Record, given: Plan | None) -> Record:
        if given is not None and given.spans != record.plan.spans[: len(given.spans)]:
            raise OutputError(f"{out}: was made by another plan; choose another --out")
        self._check_steps(record.plan)
        return record if given is not None else self._extended(out, record)

    def grown(self, out: Place, record: Record) -> Record:
        """`record` with the whole spans that the run has gained; with all of them at its end."""
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
        made.write(out)
        return made

    def _check_steps(self, planned: Plan) -> None:
        gone = set(planned.steps) - set(self.series.steps)
        if gone:
            raise CheckpointError(
                f"{self.run}: {len(gone)} planned checkpoints are missing, the first at step "
                f"{min(gone)}; restore them, or analyze what there is into another output"
            )
