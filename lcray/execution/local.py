"""Spans in this process, one after another, without Ray: for small jobs, notebooks and debuggers.

Spans, commits and tables are those that workers make under the same plan, bit for bit. The task
runs in the calling thread, so breakpoints stop where they stand. The process is the user's: it is
left as it was found.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from lcray.errors import DisagreementError, LcrayError, TaskError, UsageError
from lcray.execution.cluster.resources import Resources, check_resources, only_on_ray
from lcray.execution.cluster.scheduler import Policy
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.reports import Outcome, RunningSpan, SpanReport, View
from lcray.execution.worker.state import folder_kept, state_kept
from lcray.execution.worker.tuning import rough_seconds
from lcray.execution.worker.workbench import Share
from lcray.execution.worker.workers import Workers
from lcray.execution.worker.workspace import Workspace
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.output import Output
from lcray.tables.reducing.reduce import Reduction, merge
from lcray.tasks.model.vectors import release
from lcray.tasks.task import TaskSource

_SECONDS_A_TICK = 1.0
_POLICY = Policy()


class Local(Workers):
    """This process as the only worker.

    Args:
        source: where the task is.
        run: the directory of checkpoints.
        settings: settings of the analysis.
        resources: the resources to use.
        steps: the range of steps to analyze, ``a:b``.
        threads: intra-op threads.
        limit: the most workers that can be kept busy; there is one.
        partial_sums: number of parts in which gradients are summed, before there is a plan.

    Raises:
        UsageError: for resources that this process does not have.
    """

    size = 1

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
        check_local(resources)
        self._source, self._run, self._settings = source, run, settings
        self._resources, self._steps = resources, steps
        self._threads, self._partial_sums = threads, partial_sums
        self._workspace: Workspace | None = None
        self._description: Description | None = None
        self._kept = ExitStack()

    def __enter__(self) -> Local:
        self._kept.enter_context(state_kept())
        return self

    def __exit__(self, *_: object) -> None:
        self._workspace = None
        release()
        self._kept.close()

    def describe(self) -> Description:
        """See `Workers.describe`; asked once."""
        self._description = self._description or super().describe()
        return self._description

    @folder_kept()
    def ask(self, method: str, *arguments: Any) -> Any:
        """See `Workers.ask`."""
        return getattr(self._ready(), method)(*arguments)

    @folder_kept()
    def rough_seconds(self, enough: float) -> float:
        """Roughly the seconds of one gradient of every split; see `tuning.rough_seconds`."""
        work = self._ready()
        work.go_to_first()
        return rough_seconds(work.bench, enough)

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = lambda view: None,
    ) -> Outcome:
        """See `Workers.run`; one after another, and those that failed again after the others."""
        where = out.resolve()  # the task may go elsewhere
        outcome, work = Outcome(), self._ready()
        waiting = deque((span, 1) for span in spans)
        while waiting:
            span, attempt = waiting.popleft()
            if attempt > 1:
                time.sleep(_POLICY.backoff)
            name = f"{attempt}-{uuid.uuid4().hex[:12]}"
            tell = _Telling(span, attempt, outcome.failures, on_tick)
            try:
                with folder_kept():
                    report = work.run(plan, span, where, name, tell)
            except DisagreementError:
                raise
            except LcrayError as error:
                if isinstance(error, TaskError) or attempt >= _POLICY.attempts:
                    outcome.failures[span] = str(error)
                    outcome.cause = outcome.cause or error
                else:
                    waiting.append((span, attempt + 1))
            else:
                outcome.reports[span] = report
                on_done(span, report)
        return outcome

    def reduce(self, out: Place) -> Reduction:
        """See `Workers.reduce`."""
        return merge(Output(out.resolve()))

    @folder_kept()
    def _ready(self) -> Workspace:
        if self._workspace is None:
            memory = self._resources.memory
            self._workspace = Workspace(
                self._source.load(),
                self._run,
                self._settings,
                steps=self._steps,
                share=Share(
                    _device(self._resources.gpus_per_worker),
                    self._threads,
                    None if memory is None else int(memory * 2**30),
                ),
                partial_sums=self._partial_sums,
            )
        return self._workspace


class _Telling:
    """Tells how far a span is, at most about once per second."""

    def __init__(
        self, span: Span, attempt: int, failures: dict[Span, str], on_tick: Callable[[View], None]
    ) -> None:
        self._span, self._attempt, self._failures = span, attempt, failures
        self._on_tick = on_tick
        self._started = self._told = time.monotonic()

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now - self._told >= _SECONDS_A_TICK:
            self._told = now
            span, seconds = self._span, now - self._started
            held = RunningSpan(
                span.first, span.last, self._attempt, done, span.n_intervals, seconds
            )
            self._on_tick(View(1, (held,), self._failures))


def check_local(resources: Resources) -> None:
    """Refuse resources that only workers on Ray have.

    Raises:
        UsageError: naming the option.
    """
    check_resources(resources)
    for flag, value in only_on_ray(resources).items():
        if (flag, value) != ("workers", 1):
            raise UsageError(
                f"local: works in this process alone, without Ray; leave out --{flag}, or --local"
            )


def _device(gpus: float | None) -> str:
    """Where this process computes: as a worker of this machine would."""
    there = gpus != 0 and torch.cuda.is_available()
    if gpus and not there:
        raise UsageError(f"gpus-per-worker {gpus:g}: there is no GPU here; leave it out")
    return "cuda" if there else "cpu"
