"""The verb `trace`: a second pass over a run, for elements that are chosen by their LC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lcray.analyses.extremes import extremes
from lcray.errors import OutputError, UsageError
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.analyze import analyze
from lcray.execution.driver.progress import OnProgress
from lcray.planning.check import check_traces
from lcray.planning.plan import Plan
from lcray.storage import PlaceLike, place
from lcray.storage.files import make_folder
from lcray.storage.numbers import whole_number
from lcray.tables.output import Output
from lcray.tables.reading.results import Results, open_output
from lcray.tasks.task import Task

_TABLES = ("intervals", "layers", "traces")


def trace(
    run: PlaceLike,
    task: str | Task,
    out: PlaceLike,
    *,
    elements: Iterable[str] = ("top:10",),
    into: PlaceLike | None = None,
    resources: Resources | None = None,
    on_progress: OnProgress | None = None,
) -> Results:
    """Weight, gradient and LC, step by step, of the parameters that helped and hurt most.

    All gradients of the run are computed again, by the plan of `out`. The new output has the tables
    `intervals`, `layers` and `traces`; LC is the same as in `out`, bit for bit. Running it again
    resumes.

    Args:
        run: the directory of checkpoints, or its URI.
        task: ``package.module:attribute``, ``path/file.py:attribute``, or a `Task`.
        out: an output of the same run and task, with its tables.
        elements: each ``top:k``, the k parameters that helped and the k that hurt most in each
            split (it needs `parameters`), or ``layer:index``.
        into: the new output; None for ``OUT/traced``.
        resources: workers and where they run.
        on_progress: called when the progress changes.

    Returns:
        The new output's results.

    Raises:
        UsageError: for elements that do not exist, or if there is nothing to trace.
        OutputError: if `out` has no tables, or `into` holds something else.
        CheckpointError, TaskError, IncompleteError, ClusterError: as `lcray.analyze` raises them.
    """
    results = open_output(out)
    target = results.output.traced if into is None else place(into)
    results.output.check_way(target)
    plan = _plan(results, results.plan, elements)
    second = Output(target)
    known = second.existing()
    if known is None:
        make_folder(target)
        # With the fingerprint of `out`, so that another task or other data are refused.
        second.write(replace(results.record, plan=plan))
    elif known.plan != plan:
        raise OutputError(
            f"{target}: holds the traces of other elements or steps; choose another --into"
        )
    return analyze(run, task, target, plan=plan, resources=resources, on_progress=on_progress)


def _plan(results: Results, plan: Plan, elements: Iterable[str]) -> Plan:
    """The plan of the second pass: the same spans and batches, other tables."""
    chosen = tuple(dict.fromkeys(_chosen(results, elements)))
    if not chosen:
        raise UsageError("trace: no parameter has LC; name elements, as layer:index")
    settings = replace(plan.settings, trace=chosen, parameters=None, elements=False)
    check_traces(settings, plan.layers)
    return replace(plan, settings=settings, tables=_TABLES, unit_layers=(), trace_sample=0)


def _chosen(results: Results, elements: Iterable[str]) -> Iterator[str]:
    names = [layer.name for layer in results.plan.layers]
    for item in elements:
        name, _, number = item.partition(":")
        top = whole_number(number)
        if name == "top" and top is not None and "top" not in names:
            for row in extremes(results, top=top).to_pylist():
                yield f"{row['layer']}:{row['index']}"
        else:
            yield item
