"""The public verbs: plan an analysis, and run it to its tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lcray.checkpoints import CheckpointSeries, open_series
from lcray.cluster import Pool, connection
from lcray.costs import Estimate, estimate
from lcray.drafting import check_plan, extend_plan, make_plan, make_settings
from lcray.errors import CheckpointError, IncompleteError, OutputError, UsageError
from lcray.files import read_json, write_json_atomic, writing
from lcray.locks import Lock, locked
from lcray.planning import Plan, Settings, Span
from lcray.record import (
    Record,
    carrier_versions,
    check_plan_fits,
    check_same_losses,
    check_same_numbers,
    check_same_settings,
    make_fingerprint,
    make_notes,
    read_record,
)
from lcray.resources import Resources
from lcray.results import Results, open_output
from lcray.schema import FORMAT_VERSION
from lcray.shards import committed, remove_strays
from lcray.span import SpanReport
from lcray.storage import Place, PlaceLike, place
from lcray.task import Task, locate


@dataclass(frozen=True)
class Progress:
    """How far an analysis is.

    Attributes:
        phase: ``start``, ``probe``, ``spans`` or ``reduce``.
        done: intervals that are committed.
        total: intervals in all.
    """

    phase: str
    done: int = 0
    total: int = 0


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, repr=False)
class PlanReport:
    """A plan, and what it will take.

    Attributes:
        plan: the plan.
        estimate: time, memory and disk, from a short probe.
        workers: the number it was made for.
        resident: whether a worker keeps the data of a split in memory, by split; else it streams
            them, to the same results.
        notes: what to keep in mind about the numbers, one line each.
    """

    plan: Plan
    estimate: Estimate
    workers: int
    resident: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        cost = self.estimate
        return f"PlanReport({cost.n_intervals} intervals, {cost.n_gradients} gradients)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, for ``analyze(plan=…)`` and ``analyze --plan``.

        Raises:
            OutputError: if the disk refuses.
        """
        data = {"format_version": FORMAT_VERSION, "plan": self.plan.to_dict()}
        write_json_atomic(Path(path), data)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that ``plan --save`` wrote.

    Raises:
        UsageError: if it is no plan of this version.
        OutputError: if it cannot be read.
    """
    data = read_json(Path(path))
    try:
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {data['format_version']!r}")
        loaded = Plan.from_dict(data["plan"])
        check_plan(loaded)
        return loaded
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: not a plan ({error}); make one with lcray plan --save"
        ) from error


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
        span_length: intervals a span; chosen by the number of workers otherwise.
        **options: fields of `Settings`.

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        ClusterError: if Ray fails.
    """
    job = _Job(run, task, resources, steps, span_length, make_settings(options))
    with connection(job.resources), job.pool(job.settings) as pool:
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
        span_length: intervals a span; chosen by the number of workers otherwise.
        on_progress: called whenever there is something to tell.
        **options: fields of `Settings`: ``rule``, ``refine``, ``rtol``, ``batch_norm`` …

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        OutputError: if `out` cannot be written, or holds something else.
        IncompleteError: if spans failed; the rest is committed, and the message says why.
        ClusterError: if Ray fails.
    """
    tell = on_progress or (lambda progress: None)
    given = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
    if given is not None and (options or steps or span_length):
        raise UsageError("a plan decides settings, steps and spans: leave the other options out")
    settings = given.settings if given else make_settings(options)
    if given is not None:
        steps = f"{given.steps[0]}:"  # the first checkpoint is the plan's, as when it was made
    path = place(out)
    record = read_record(path)
    if record is not None:
        check_same_settings(path, record, settings)
    known = record.plan if record else given
    job = _Job(run, task, resources, steps, span_length, settings, known)
    if isinstance(path, Path):
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    with locked(path) as lock:
        if read_record(path) != record:
            raise OutputError(f"{path}: has just changed; run the same command again")
        tell(Progress("start"))
        with connection(job.resources), job.pool(settings) as pool:
            record = job.record(pool, path, record, given, tell)
            _finish(pool, record.plan, path, lock, tell)
    return open_output(path)


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
    ) -> None:
        if span_length is not None and span_length < 1:
            raise UsageError(f"span-length {span_length}: must be at least 1")
        self.series: CheckpointSeries = open_series(run, steps)
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

    def pool(self, settings: Settings) -> Pool:
        limit = len(self.series.steps) - 1
        return Pool(
            self.source,
            self.run,
            settings,
            self.resources,
            steps=self.steps,
            threads=self.threads,
            limit=limit,
        )

    def draft(self, pool: Pool) -> PlanReport:
        description, probe = pool.describe(), pool.probe()
        drafted = make_plan(
            self.series.steps,
            self.settings,
            description.layers,
            probe.splits,
            workers=pool.size,
            span_length=self.span_length,
            threads=self.threads,
            device_kind=description.device_kind,
            batch_size=probe.tuning.batch_size,
            memory_format=probe.tuning.memory_format,
        )
        cost = estimate(drafted, pool.size, seconds=probe.seconds, worker_bytes=probe.worker_bytes)
        notes = make_notes(description, drafted.settings)
        return PlanReport(drafted, cost, pool.size, probe.resident, notes)

    def record(
        self,
        pool: Pool,
        out: Place,
        record: Record | None,
        given: Plan | None,
        tell: OnProgress,
    ) -> Record:
        """The record to work by, written to `out` before the first span."""
        description = pool.describe()
        if record is not None:
            check_same_numbers(out, record, description, description.layers)
            check_same_losses(out, record, pool.losses(record.plan))
            return self._continued(out, record, given)
        if given is not None:
            check_plan_fits(given, description)
            self._check_steps(given)
            chosen = given
        else:
            tell(Progress("probe"))
            chosen = self.draft(pool).plan
        made = Record(
            self.run,
            self.source.reference,
            chosen,
            make_fingerprint(description),
            carrier_versions(),
            make_notes(description, chosen.settings),
        )
        made.write(out)
        return made

    def _continued(self, out: Place, record: Record, given: Plan | None) -> Record:
        if given is not None and given.spans != record.plan.spans[: len(given.spans)]:
            raise OutputError(f"{out}: was made by another plan; choose another --out")
        self._check_steps(record.plan)
        if given is not None:
            return record
        extended = extend_plan(record.plan, self.series.steps)
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


def _finish(pool: Pool, plan: Plan, out: Place, lock: Lock, tell: OnProgress) -> None:
    """Compute the spans that are not committed, and merge all into tables."""
    failures = _run_spans(pool, plan, out, lock, tell)
    if failures:
        raise IncompleteError(_explain(out, failures))
    lock.check()
    remove_strays(out, plan.spans)
    tell(Progress("reduce", plan.n_intervals, plan.n_intervals))
    pool.reduce(out)


def _run_spans(pool: Pool, plan: Plan, out: Place, lock: Lock, tell: OnProgress) -> dict[Span, str]:
    done = committed(out, plan.spans)
    count = sum(len(span.intervals) for span in done)
    tell(Progress("spans", count, plan.n_intervals))

    def on_done(span: Span, report: SpanReport) -> None:
        nonlocal count
        lock.check()
        count += len(span.intervals)
        tell(Progress("spans", count, plan.n_intervals))

    todo = [span for span in plan.spans if span not in done]
    return pool.run(plan, todo, out, on_done).failures


def _explain(out: Place, failures: dict[Span, str]) -> str:
    lost = sum(len(span.intervals) for span in failures)
    names = ", ".join(f"{span.first}-{span.last}" for span in list(failures)[:6])
    more = ", …" if len(failures) > 6 else ""
    span, reason = next(iter(failures.items()))
    return (
        f"{out}: {lost} intervals are missing (steps {names}{more}): {span.first}-{span.last}: "
        f"{reason}; the rest is committed: run the same command again to retry, or lcray reduce "
        f"{out} --allow-missing for the tables of what there is"
    )
