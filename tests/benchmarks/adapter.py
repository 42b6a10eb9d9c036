"""The inside of lcray as the benchmarks use it: everything that its changes can break is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcray.allocation.gradient import GradientEngine
from lcray.allocation.interval import IntervalLC
from lcray.allocation.path import Point, Segment
from lcray.allocation.quadrature import get_rule
from lcray.errors import UsageError
from lcray.execution.worker.agreement import measure
from lcray.execution.worker.independence import Independence, two_points
from lcray.execution.worker.prefetch import Walk
from lcray.execution.worker.process import tune_process, worker_environment
from lcray.execution.worker.reports import SpanReport
from lcray.execution.worker.workbench import Share
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Crew, Plan, Probed, SplitPlan
from lcray.tables.output import Output
from lcray.tables.record import Record
from lcray.tables.writing.row_groups import ElementsWriter
from lcray.tables.writing.split_tables import SplitTables
from lcray.tasks.layer import Layer
from lcray.tasks.task import Task, load_task

__all__ = [
    "ElementsWriter",
    "IntervalLC",
    "Plan",
    "Point",
    "Segment",
    "SplitTables",
    "Stopwatch",
    "checks",
    "count_gradients",
    "draft",
    "has_rule",
    "open_workspace",
    "planned_batch",
    "planned_gradients",
    "run_span",
    "tables_plan",
    "time_evaluations",
    "tune",
    "worker_environment",
    "write_plan",
]


def tune() -> None:
    """Set this process up as a worker does."""
    tune_process("cpu")


def open_workspace(
    task: str | Task,
    run: str | Path,
    options: Mapping[str, Any],
    steps: str | None = None,
    threads: int = 1,
    sharers: int = 1,
) -> Workspace:
    """A task's model and data, as one of `sharers` workers on a machine holds them."""
    found = load_task(task) if isinstance(task, str) else task
    settings = make_settings(options)
    share = Share(threads=threads, sharers=sharers)
    return Workspace(found, str(run), settings, steps=steps, share=share)


def has_rule(name: str) -> bool:
    """Whether an analysis may be asked for this rule."""
    try:
        make_settings({"rule": name})
    except UsageError:
        return False
    return True


def draft(workspace: Workspace, span_length: int, threads: int = 1) -> Plan:
    """The plan that an analysis would make; spans are whole blocks where the rule has some."""
    description, probe = workspace.describe(), workspace.probe()
    block = get_rule(workspace.settings.rule).block or 1
    return make_plan(
        workspace.series.steps,
        workspace.settings,
        description.layers,
        probe.splits,
        crew=Crew(threads=threads, device_kind=description.device_kind),
        probed=Probed(batch_size=probe.tuning.batch_size, memory_format=probe.tuning.memory_format),
        span_length=-(-span_length // block) * block,
    )


def tables_plan(shapes: Sequence[tuple[int, ...]], intervals: int) -> Plan:
    """A plan with the default tables, of one span, for layers of these shapes."""
    layers = [Layer(f"layer{n}", "", "parameter", s, 0, True) for n, s in enumerate(shapes)]
    steps, split = range(intervals + 1), SplitPlan("train", 1, 1, 1.0, 1.0, 1)
    return make_plan(steps, make_settings({}), layers, [split], span_length=intervals)


def run_span(workspace: Workspace, plan: Plan, index: int, out: Path) -> SpanReport:
    """Compute a span and commit it into `out`."""
    return workspace.run(plan, plan.spans[index], out, "bench")


def count_gradients(plan: Plan, report: SpanReport) -> int:
    """All gradients of a span, its left end's included."""
    return report.n_gradients + len(plan.splits) * get_rule(plan.settings.rule).has_left


def planned_gradients(plan: Plan, intervals: int) -> int:
    """All gradients of a span of so many intervals, if none is refined."""
    rule = get_rule(plan.settings.rule)
    return len(plan.splits) * (intervals * rule.n_gradients + rule.has_left)


def checks(workspace: Workspace) -> dict[str, Callable[[], object]]:
    """What an analysis checks at its start, after it has evaluated all losses."""

    def read(step: int) -> Point:
        with Walk(workspace.series, workspace.flat, workspace.series.read(step).dtypes) as walk:
            return walk.read(step)

    bench, steps = workspace.bench, workspace.series.steps
    first = read(steps[0])
    Segment(first, first).set_point(workspace.flat, 0.0)
    independence = Independence(bench, workspace.task)
    for split in bench.splits:
        independence.evaluate(split)
    return {
        "fresh": workspace.check,
        "independence": lambda: independence.check(two_points(steps, read)),
        "agreement": lambda: measure(bench, read(steps[0])),
    }


def planned_batch(workspace: Workspace, plan: Plan) -> Callable[[], object]:
    """The largest batch of the first split, passed forward and backward."""
    bench = workspace.bench
    bench.adopt(plan.batch_size, plan.memory_format, plan.partial_sums)
    largest, out = bench.excerpt(0, plan.batch_size), bench.engine.new_vector()
    return lambda: bench.engine.evaluate(largest, out)


def write_plan(plan: Plan, out: Path) -> None:
    """Make `out` an output that can be reduced once its spans are committed."""
    out.mkdir(parents=True)
    Output(out).write(Record("run", "m:t", plan, {}, {}))


class Stopwatch:
    """Seconds spent inside the functions that it has wrapped, calls in calls counted once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self._clock, self._depth, self._begin = clock, 0, 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:
                self._begin = self._clock()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += self._clock() - self._begin

        return timed


def time_evaluations() -> Stopwatch:
    """A stopwatch on every evaluation of losses and gradients in this process."""
    watch = Stopwatch()
    for name in [name for name in vars(GradientEngine) if name.startswith("evaluate")]:
        setattr(GradientEngine, name, watch.wrap(getattr(GradientEngine, name)))
    return watch
