"""Where an analysis runs: on Ray, or in this process where that is sooner done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from lcray.allocation.quadrature import get_rule
from lcray.errors import LcrayError
from lcray.execution.cluster.resources import only_on_ray
from lcray.execution.driver.job import Job
from lcray.execution.driver.progress import OnProgress, Progress
from lcray.execution.local import Local
from lcray.execution.worker.workers import Workers
from lcray.planning.costs import START_SECONDS
from lcray.planning.plan import Plan
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.shards.commit import each_commit

_LARGEST = 1 << 27  # bytes of a checkpoint; a larger model does not come into this process unasked


@contextmanager
def workers(
    job: Job,
    tell: OnProgress = lambda progress: None,
    known: Plan | None = None,
    out: Place | None = None,
) -> Iterator[Workers]:
    """The workers of `job`: this process where that is asked for or, if nothing is, sooner done.

    Args:
        job: the job; its resources then say whether they are this process.
        tell: whom to tell what was chosen.
        known: the plan, if there is one.
        out: the output, if it may have commits of that plan.

    Raises:
        UsageError, ClusterError: as starting workers raises them.
        TaskError, CheckpointError: from building model and data in this process.
    """
    if job.resources.local:
        with job.pool(Local) as pool:
            tell(Progress("local"))
            yield pool
        return
    if _is_open(job):
        with job.pool(Local) as pool:
            seconds = _seconds(job, pool, known, out)
            if seconds <= START_SECONDS:
                job.resources = replace(job.resources, local=True)
                tell(Progress("local", seconds_left=seconds))
                yield pool
                return
    with _on_ray(job, tell) as pool:
        yield pool


@contextmanager
def _on_ray(job: Job, tell: OnProgress) -> Iterator[Workers]:
    from lcray.execution.cluster.supervision import workplace  # imports ray, which takes time

    def restarting() -> None:
        tell(Progress("restart"))

    tell(Progress("start"))
    with workplace(job.resources, restarting) as make, job.pool(make) as pool:
        yield pool


def _is_open(job: Job) -> bool:
    """Whether nothing that was asked for, and no Ray that is there, decides for workers."""
    ray = sys.modules.get("ray")
    is_initialized: Callable[[], bool] = getattr(ray, "is_initialized", lambda: False)
    return (
        job.resources.local is None
        and not job.resources.gpus_per_worker
        and not only_on_ray(job.resources)
        and not os.environ.get("RAY_ADDRESS")
        and not is_initialized()
        and job.growth is None
        and job.series.checkpoints[0].nbytes <= _LARGEST
    )


def _seconds(job: Job, pool: Local, known: Plan | None, out: Place | None) -> float:
    """What all gradients that are left take this process: by the plan, or a short measurement.

    Infinite if that cannot be told, or is too long.
    """
    n_left = len(job.series.steps) - 1
    if known is not None and known.seconds is not None:
        if out is not None:
            with suppress(LcrayError):  # reported once they are read for the analysis
                n_left -= sum(span.n_intervals for span, _ in each_commit(out, known.spans))
        return max(0, n_left) * known.seconds * _most_panels(job.settings)
    if job.settings.fisher is not None:
        return float("inf")
    passes = n_left * get_rule(job.settings.rule).n_gradients * _most_panels(job.settings)
    return passes * pool.rough_seconds(START_SECONDS / passes)


def _most_panels(settings: Settings) -> int:
    return settings.max_panels if settings.refine else 1
