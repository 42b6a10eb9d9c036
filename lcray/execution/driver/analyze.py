"""The public verbs: plan an analysis, and run it to its tables."""

from __future__ import annotations

import os
import time
from typing import Unpack

from lcray.errors import IncompleteError, OutputError, UsageError
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.choose import workers
from lcray.execution.driver.follow import SECONDS_A_LOOK, Growth
from lcray.execution.driver.job import Job
from lcray.execution.driver.progress import Computation, OnProgress, Progress, explain
from lcray.execution.driver.record import check_same_settings
from lcray.execution.driver.repair import take_back
from lcray.execution.driver.revisit import Revisit, revisit_last
from lcray.execution.driver.status import StatusFile
from lcray.execution.worker.workers import Workers
from lcray.planning.check import check_plan
from lcray.planning.costs import seconds_an_interval
from lcray.planning.make import make_settings
from lcray.planning.plan import Plan
from lcray.planning.saved import PlanReport, load_plan
from lcray.settings import PlanOptions
from lcray.storage import Place, PlaceLike, place
from lcray.storage.files import make_folder
from lcray.storage.lock import Lock
from lcray.tables.output import Output
from lcray.tables.reading.results import Results, results_of
from lcray.tables.record import Record
from lcray.tables.shards.writer import remove_strays
from lcray.tasks.task import Task

__all__ = ["PlanReport", "Progress", "analyze", "load_plan", "plan"]


def plan(
    run: PlaceLike,
    task: str | Task,
    *,
    resources: Resources | None = None,
    **options: Unpack[PlanOptions],
) -> PlanReport:
    """Plan an analysis, and measure what a gradient costs; nothing is written.

    Args:
        run: the directory of checkpoints, or its URI.
        task: ``package.module:attribute``, ``path/file.py:attribute``, or a `Task`.
        resources: workers and where they run; by default this process does the work if all
            gradients take less time than starting workers.
        **options: ``steps`` (the range of steps to analyze, ``a:b``), ``span_length`` (intervals
            per span; chosen by their duration and number otherwise) and the fields of `Settings`.

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        ClusterError: if Ray fails.
    """
    steps, span_length = options.pop("steps", None), options.pop("span_length", None)
    job = Job(run, task, resources, steps, span_length, make_settings(options))
    with workers(job) as pool:
        return job.draft(pool)


def analyze(
    run: PlaceLike,
    task: str | Task,
    out: PlaceLike,
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    resources: Resources | None = None,
    repair: bool = False,
    follow: bool = False,
    idle: float | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[PlanOptions],
) -> Results:
    """Allocate the loss changes of a run to its parameters, into the tables of `out`.

    Running it again with the same arguments resumes: committed spans are skipped, and steps that
    the run has gained are added.

    Args:
        run: the directory of checkpoints, or its URI.
        task: ``package.module:attribute``, ``path/file.py:attribute``, or a `Task`.
        out: the output directory, or its URI; new, or of the same analysis.
        plan: a plan, or the file of one, instead of options.
        resources: workers and where they run; by default this process does the work if all
            gradients take less time than starting workers.
        repair: read the committed spans, and compute those again that are damaged, or whose
            checkpoints have changed since.
        follow: continue while training still writes, until the run has ended (see `idle`). Then
            also give `window`: by default it is chosen by the steps that exist at the start.
        idle: with `follow`, seconds without a new checkpoint after which the run has ended. None is
            600, or no limit if a recorder keeps a ``run.json``, which records the end.
        on_progress: called when the progress changes.
        **options: the options of `lcray.plan`: ``steps``, ``span_length``, ``rule``, ``refine`` …

    Raises:
        UsageError: for options that cannot be used.
        CheckpointError: if the run cannot be read.
        TaskError: if the task breaks its contract.
        OutputError: if `out` cannot be written, holds something else, or was computed from other
            checkpoints than the run has now.
        IncompleteError: if spans failed; the message says why. Committed spans are kept.
        ClusterError: if Ray fails.
    """
    tell = on_progress or (lambda progress: None)
    if idle is not None and not follow:
        raise UsageError(f"idle {idle:g}: is for --follow")
    steps, span_length = options.pop("steps", None), options.pop("span_length", None)
    given = _given(plan, follow=follow, others=bool(options or steps or span_length))
    settings = given.settings if given else make_settings(options)
    # A given plan fixes the first checkpoint, too.
    steps = f"{given.steps[0]}:" if given else steps
    path = place(out)
    output = Output(path)
    record = output.existing()
    if record is not None:
        check_same_settings(path, record, settings)
    growth = Growth(run, steps, idle) if follow else None
    known = record.plan if record else given
    job = Job(run, task, resources, steps, span_length, settings, known, growth)
    make_folder(path)
    with output.locked() as lock:
        if output.existing() != record:
            raise OutputError(f"{path}: has just changed; run the same command again")
        if repair and record is not None:
            take_back(path, record.plan.spans)
        _work(job, path, record, given, lock, tell, repair)
    return results_of(output)


def _given(
    plan: Plan | str | os.PathLike[str] | None, *, follow: bool, others: bool
) -> Plan | None:
    """The given plan, if there is one; other options are then refused."""
    given = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
    if isinstance(plan, Plan):
        check_plan(plan)
    if given is not None and others:
        raise UsageError("a plan decides settings, steps and spans: leave the other options out")
    if given is not None and follow:
        raise UsageError("a plan has its steps: --follow is for analyses without --plan")
    return given


def _work(
    job: Job,
    path: Place,
    known: Record | None,
    given: Plan | None,
    lock: Lock,
    tell: OnProgress,
    repair: bool,
) -> None:
    """Do everything that needs workers, by the known record or a new one."""
    plan = known.plan if known else given
    with workers(job, tell, plan, path if known else None) as pool:
        record = job.record(pool, path, known, given, tell)
        with StatusFile(path, record.plan, lock.holds) as file:
            _compute(job, pool, path, record, file, lock, tell, repair)


def _compute(
    job: Job,
    pool: Workers,
    out: Place,
    record: Record,
    file: StatusFile,
    lock: Lock,
    tell: OnProgress,
    repair: bool,
) -> None:
    """Compute the spans that are not committed, follow the run, and merge all spans into tables."""
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
        text = explain(out, computation.failures, file.latest.intervals_done)
        raise IncompleteError(text) from computation.cause
    lock.check()
    remove_strays(out, record.plan.spans)
    total = record.plan.n_intervals
    tell(Progress("reduce", total, total))
    file.state("reducing")
    pool.reduce(out)
