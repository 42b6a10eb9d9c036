"""The loop that carries out the scheduler's decisions on Ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lcray.errors import DisagreementError, LcrayError, TaskError, TeamError
from lcray.execution.cluster.actor import Beats
from lcray.execution.cluster.calls import Reference, fetched, result
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.cluster.metrics import Metrics
from lcray.execution.cluster.scheduler import Assign, Decision, GiveUp, Policy, Replace, Scheduler
from lcray.execution.cluster.workers import Crew
from lcray.execution.worker.reports import Outcome, RunningSpan, SpanReport, View
from lcray.planning.costs import seconds_an_interval
from lcray.planning.plan import Plan, Span
from lcray.storage import Place

_SECONDS_A_TICK = 1.0
_SECONDS_TO_GATHER = 0.005  # to gather results that arrive together, and check workers once
_SECONDS_A_LOOK = 5.0  # between two looks at the cluster's nodes
_DEAF = 10.0  # seconds without a sign of any worker; then none is blamed for silence


OnTick = Callable[[View], None]


class Dispatch:
    """One call of `lcray.execution.cluster.pool.Pool.run`."""

    def __init__(
        self,
        crew: Crew,
        plan: Plan,
        spans: Sequence[Span],
        out: Place,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: OnTick,
        metrics: Metrics,
    ) -> None:
        self._crew, self._spans, self._out = crew, spans, out
        self._on_done, self._on_tick = on_done, on_tick
        self._scheduler = Scheduler(
            [span.n_intervals for span in spans],
            policy=Policy() if crew.patience is None else Policy(patience=crew.patience, slack=0.0),
            seconds=seconds_an_interval(plan, crew.team),
            step_seconds=_step_seconds(plan, crew.team),
        )
        self._outcome = Outcome()
        self._metrics = metrics
        self._plan = ray.put(plan.without_spans())  # workers read it again with every span
        self._busy: dict[Reference, int] = {}
        self._names: dict[int, str] = {}  # the current attempt of a worker
        self._beats = _start_beats()
        self._asked: Reference = None
        self._heard = self._looked = self._ticked = time.monotonic()

    def run(self) -> Outcome:
        """Run until every span is done or given up.

        Raises:
            TaskError, CheckpointError, ClusterError: as setting up a worker raises them.
            DisagreementError: if a worker's numbers differ from the plan's.
        """
        try:
            now = time.monotonic()
            for number in list(self._crew.ready):
                self._carry_out(self._scheduler.worker_ready(number, now))
            while not self._scheduler.finished:
                self._crew.fill(self._scheduler.unfinished)
                self._take_results()
                self._tick()
            for number in set(self._busy.values()):  # copies that are no longer needed
                self._crew.end(number)
        finally:
            ray.kill(self._beats)
        return self._outcome

    def _take_results(self) -> None:
        """Wait for an event, at most one tick, and handle all events that have happened."""
        waiting = [*self._busy, *self._crew.setting_up]
        if not waiting:
            time.sleep(_SECONDS_A_TICK)
            return
        ready, rest = ray.wait(waiting, num_returns=1, timeout=_SECONDS_A_TICK, fetch_local=False)
        if ready and rest:
            more = len(rest)
            ready += ray.wait(
                rest, num_returns=more, timeout=_SECONDS_TO_GATHER, fetch_local=False
            )[0]
        reports = fetched([reference for reference in ready if reference in self._busy])
        for reference in ready:
            if reference in self._busy:
                self._take(reference, reports.get(reference))
            elif (number := self._crew.welcome(reference)) is not None:
                self._carry_out(self._scheduler.worker_ready(number, time.monotonic()))

    def _take(self, reference: Reference, report: SpanReport | None) -> None:
        number = self._busy.pop(reference)
        del self._names[number]
        held, now = self._scheduler.running.get(number), time.monotonic()
        try:
            report = report or result(reference)
        except (RayError, TeamError) as error:
            self._crew.end(number)
            lead = f"its worker died ({in_one_line(error)})"
            reason = str(error) if isinstance(error, TeamError) else lead
            self._carry_out(self._scheduler.worker_lost(number, reason, now))
        except DisagreementError:
            raise
        except LcrayError as error:
            final = isinstance(error, TaskError)
            self._carry_out(self._scheduler.span_failed(number, str(error), now, final=final))
        else:
            if held is not None and report is not None:
                self._finish(self._spans[held.span], report)
            self._carry_out(self._scheduler.span_done(number, now))

    def _finish(self, span: Span, report: SpanReport) -> None:
        if span in self._outcome.reports:
            return  # by a copy
        self._outcome.failures.pop(span, None)
        self._outcome.reports[span] = report
        self._metrics.done(span, report)
        self._on_done(span, report)

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Assign(worker=int(number), span=index, attempt=attempt):
                    name = f"{attempt}-{uuid.uuid4().hex[:12]}"
                    self._names[number] = name
                    actor = self._crew.ready[number]
                    call = actor.run_span.remote(
                        self._plan, self._spans[index], str(self._out), name, self._beats
                    )
                    self._busy[call] = number
                case Replace(worker=int(number)):
                    self._busy = {ref: n for ref, n in self._busy.items() if n != number}
                    del self._names[number]
                    self._crew.end(number)
                case GiveUp(span=index, reason=reason):
                    self._metrics.failed()
                    self._outcome.failures[self._spans[index]] = reason

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked < _SECONDS_A_TICK:
            return
        self._ticked = now
        if now - self._looked >= _SECONDS_A_LOOK:
            self._looked = now
            self._crew.follow()
        self._listen(now)
        self._carry_out(self._scheduler.tick(now))
        self._on_tick(self._view(now))

    def _listen(self, now: float) -> None:
        """Take progress reports; replace silent workers, unless all seem to be silent."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            try:
                told: Any = ray.get(asked)
            except RayError:  # it is started again, on another node if necessary
                return
            if now - self._heard > _DEAF:
                self._scheduler.forgive(now)
            self._heard = now
            for number, name in self._names.items():
                if name in told:
                    self._scheduler.progress(number, told[name], now)
            self._carry_out(self._scheduler.overdue(now))
        if self._asked is None:
            self._asked = self._beats.take.remote()

    def _view(self, now: float) -> View:
        running = []
        for held in self._scheduler.running.values():
            span, seconds = self._spans[held.span], now - held.started
            running.append(
                RunningSpan(
                    span.first, span.last, held.attempt, held.done, span.n_intervals, seconds
                )
            )
        workers = len(self._crew.ready) * self._crew.team
        return View(workers, tuple(running), self._outcome.failures)


def _step_seconds(plan: Plan, team: int) -> float | None:
    """The longest expected duration of one split of one interval, with all refinement."""
    seconds = seconds_an_interval(plan, team)
    if seconds is None:
        return None
    return seconds * (plan.settings.max_panels if plan.settings.refine else 1)


def _start_beats() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(Beats).options(**options).remote()
