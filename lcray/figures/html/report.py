"""The verb `report`: one page of one output, or of several side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lcray.analyses.closure import closures
from lcray.errors import InapplicableError, UsageError, one_line
from lcray.figures.html import along_the_run, elements, layers, shares, synchrony
from lcray.figures.html.comparison import compared
from lcray.figures.html.head import head, run_name
from lcray.figures.html.page import links_to, plotly_source, render
from lcray.figures.html.sections import Absent, Section
from lcray.figures.html.slider import windows
from lcray.figures.html.source import Source, read_source
from lcray.figures.html.store import Store
from lcray.storage import Place, PlaceLike, place, storage_of
from lcray.storage.files import writing
from lcray.tables.reading.results import Results, open_output

#: The names of the pages in an output.
PAGE, COMPARISON = "report.html", "comparison.html"

#: Id, title unless the section has its own, and the function that makes it, in the page's order.
SECTIONS: tuple[tuple[str, str, Callable[[Source, Store], Section]], ...] = (
    ("loss", "Loss and its reconstruction from LC", along_the_run.loss),
    ("layers", "Loss change allocated to each layer", layers.totals),
    ("heat-map", "Every layer at every iteration", along_the_run.heat_map),
    ("trajectories", "Cumulative LC of each layer", along_the_run.trajectories),
    ("shares", "How many parameters help", shares.shares),
    ("distribution", "Distribution of |LC|", elements.distribution),
    ("units", "Units of a layer", elements.units),
    ("traces", "Single parameters: oscillation", elements.traces),
    ("synchrony", "Do layers learn at the same iterations?", synchrony.synchrony),
    ("classes", "Classes and layers", synchrony.classes),
    ("splits", "Train and validation", layers.splits),
    ("first-order", "First-order LC compared with the rule", shares.first_order),
    ("fisher", "Fisher information and LC", layers.fisher),
)


def report(out: PlaceLike, *others: PlaceLike, file: str | os.PathLike[str] | None = None) -> Place:
    """Make one HTML page of an output: charts, tables, and the source of each number.

    The page is one file that needs no server and no network. The same tables give the same bytes.

    Args:
        out: the output directory or its URI, with its tables.
        *others: further outputs; the page then shows all of them side by side.
        file: where to write; None for ``OUT/report.html``, or ``OUT/comparison.html`` for several.

    Returns:
        Where the page is.

    Raises:
        UsageError: if Plotly is missing, an output is given twice, their first splits have
            different names, or `file` is part of an output.
        OutputError: if there are no tables, or the page cannot be written.
        CorruptionError: if a table is damaged.
    """
    plotly_source()  # fail before anything is computed
    results = [open_output(one) for one in (out, *others)]
    if len({_real(one.path) for one in results}) < len(results):
        raise UsageError(f"{results[0].path}: an output is given twice; give each once")
    first = list(dict.fromkeys(one.plan.splits[0].name for one in results))
    if len(first) > 1:
        raise UsageError(
            f"{results[0].path}: the outputs' first splits differ ({', '.join(first)}), but first "
            "splits are compared; give outputs whose first split has the same name"
        )
    root = results[0].path
    inside = root / (COMPARISON if others else PAGE)
    target = inside if file is None else place(file)
    for one in results:
        one.output.beside(target)
    page = target if isinstance(target, Path) else Path("/") / "page.html"
    text = compared(results, page) if others else single(results[0], page)
    with writing(target):
        storage_of(target).write(target, text)
    return target


def _real(out: Place) -> str:
    return str(out.resolve()) if isinstance(out, Path) else str(out)


def single(results: Results, page: Path) -> bytes:
    """The page of one output, for a file at `page`; raises as `report`."""
    source, store = read_source(results), Store()
    found = closures(source.results)
    sections = [_made(source, store, *item) for item in SECTIONS]
    data = {
        "splits": [one_line(name) for name in source.splits],
        "layers": [one_line(name) for name in source.layers],
        "windows": windows(source, store),
    }
    name = run_name(results)
    links = links_to(results.path, page, results.tables)
    return render(
        f"{name} · loss change allocation", head(source, found, name), sections, data, store, links
    )


def _made(
    source: Source, store: Store, id: str, title: str, make: Callable[[Source, Store], Section]
) -> Section | Absent:
    try:
        made = make(source, store)
        return replace(made, id=id, title=made.title or title)
    except InapplicableError as error:
        return Absent(id, title, str(error))
