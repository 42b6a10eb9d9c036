"""Sections about common learning: peaks of layers, and classes with layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from lcray.analyses.requirements import require
from lcray.analyses.series import scattered
from lcray.analyses.synchrony import coincidences, peaks_of_learning
from lcray.errors import InapplicableError, one_line
from lcray.figures.data.grouping import Floats, colour_limit, total
from lcray.figures.html.along_the_run import along
from lcray.figures.html.charts import STEP, axis, heat, heat_of_lc, hover, marks, rows
from lcray.figures.html.sections import (
    LOSS,
    Control,
    Figure,
    Section,
    bars_height,
    count,
    plotted,
    signed,
)
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store, column

#: The most cells of `layers` in which a page looks for peaks, and the most layers of a matrix.
MOST_FOR_PEAKS, MOST_LAYERS = 5_000_000, 120


def synchrony(source: Source, store: Store) -> Section:
    """When layers have their peaks of learning, and which layers peak together."""
    if source.n_intervals * len(source.splits) * len(source.layers) > MOST_FOR_PEAKS:
        raise InapplicableError("the run is too long for a page; lcray findings computes it")
    peaks = peaks_of_learning(source.results, groups=False).to_pandas()
    peaks = peaks[(peaks["kind"] == "layer") & peaks["group"].isna()]
    if not len(peaks):
        raise InapplicableError("no layer has a peak of learning: there are too few intervals")
    pairs = coincidences(source.results, groups=False)
    pairs = pairs.filter(
        pc.and_(pc.equal(pc.cast(pairs["kind"], "string"), "layer"), pc.is_null(pairs["group"]))
    ).to_pandas()
    figures = {}
    parameters = [la.name for la in source.results.plan.layers if la.kind == "parameter"]
    for s, split in enumerate(source.splits):
        here = peaks[peaks["split"] == split]
        figures[f"{s}.0"] = _peak_figure(store, here, parameters, source.results.plan.steps)
        matrix = pairs[pairs["split"] == split]
        figures[f"{s}.1"] = _matrix_figure(store, matrix, parameters[:MOST_LAYERS])
    first = pairs[(pairs["split"] == source.splits[0]) & (pairs["a"] != pairs["b"])]
    sure = first[first["p_adjusted"] < 0.05]
    n = len(first) // 2
    return Section(
        f"{len(sure) // 2} of {count(n, 'pair')} of layers peak together more often than chance "
        f"on {one_line(source.splits[0])} (adjusted p < 0.05).",
        "A mark is one of the deepest dips of a layer's LC, its peaks of learning; columns of "
        "marks are iterations at which many layers learned. The matrix counts shared peaks above "
        "what chance would give.",
        ("layers",),
        "SELECT split, layer, start_step, lc FROM layers WHERE kind = 'parameter'\n"
        "QUALIFY row_number() OVER (PARTITION BY split, layer ORDER BY lc) <= 20",
        figures,
        controls=(Control("Show", ["peaks along the run", "matrix of pairs"]),),
        time=True,
        notes=(
            "`lcray findings` stores peaks and coincidences. Layers share their mini-batches, so "
            "peaking together does not say why.",
            *(
                (f"The matrix has the first {MOST_LAYERS} layers.",)
                if len(parameters) > MOST_LAYERS
                else ()
            ),
        ),
    )


def _peak_figure(store: Store, here: Any, layers: list[str], known: Sequence[int]) -> Figure:
    at = here["series"].astype(str).map({name: i for i, name in enumerate(layers)})
    steps, lc = here["start_step"].to_numpy(np.int64), here["lc"].to_numpy(float)
    ends = np.array(known)[np.searchsorted(known, steps) + 1]
    names = [str(name) for name in here["series"]]
    said = [
        f"{plotted(name)}<br>steps {start:,} to {end:,}"
        for name, start, end in zip(names, steps, ends, strict=True)
    ]
    marker = {"color": "@helps", "symbol": "line-ns", "size": 11}
    marker["line"] = {"width": 2, "color": "@helps"}
    text = hover("%{text}", f"peak of learning, LC %{{customdata:.4g}} ({LOSS})")
    more = {"text": said, "customdata": store.put(lc)}
    middle = store.put((steps + ends) / 2)  # of the interval
    trace = marks(middle, [int(i) for i in at], marker, text, **more)
    layout = {
        "xaxis": {**STEP, "range": [known[0], known[-1]]},
        "yaxis": {"names": layers, "range": [len(layers) - 0.5, -0.5], "rows": True},
        "showlegend": False,
    }
    columns = [
        column("layer", names),
        column("start_step", store.put(steps), "step"),
        column("lc", store.put(lc), "loss"),
    ]
    return Figure([trace], layout, bars_height(len(layers), 18, 220), columns, len(names))


def _matrix_figure(store: Store, pairs: Any, layers: list[str]) -> Figure:
    pairs = pairs[pairs["a"].isin(layers) & pairs["b"].isin(layers)]
    n = len(layers)
    place = {name: i for i, name in enumerate(layers)}
    at = tuple(pairs[k].astype(str).map(place).to_numpy(np.int64) for k in ("a", "b"))
    together, expected = (pairs[k].to_numpy(float) for k in ("coincidences", "expected"))
    extra = scattered((n, n), at, together - expected)
    text = hover("%{y} and %{x}", "whole run", "%{z:.3g} shared peaks above chance")
    colours = {"colours": "@contrast", "bar": "shared peaks above chance"}
    names = [plotted(name) for name in layers]
    trace = heat(names, layers, store.put(extra), colour_limit(extra, 100), text, **colours)
    layout = {
        "xaxis": {"names": layers, "tickangle": -60},
        "yaxis": rows(layers),
        "untimed": True,
    }
    columns = [
        column("layer", [str(name) for name in pairs["a"]]),
        column("other", [str(name) for name in pairs["b"]]),
        column("coincidences", store.put(together), "intervals"),
        column("expected", store.put(expected), "intervals"),
        column("p_adjusted", store.put(pairs["p_adjusted"].to_numpy(float))),
    ]
    return Figure([trace], layout, min(900, 160 + 20 * n), columns, len(pairs))


def classes(source: Source, store: Store) -> Section:
    """LC by class and layer, and by class along the run."""
    require(source.results, "groups")
    over_run = source.results.sql_arrow(
        f'SELECT split, layer, "group", {total("lc")} FROM groups '
        'GROUP BY split, layer, "group" ORDER BY split, layer, "group"'
    ).to_pandas()
    along = source.grid.read(
        source.results, "groups", [total("lc")], ("split", '"group"')
    ).to_pandas()
    if not len(over_run):
        raise InapplicableError("no interval has LC by class")
    figures = {}
    for s, split in enumerate(source.splits):
        figures[f"{s}.0"] = _class_layer(source, store, over_run[over_run["split"] == split])
        figures[f"{s}.1"] = _class_time(source, store, along[along["split"] == split])
    first = over_run[over_run["split"] == source.splits[0]].groupby("group")["lc"].sum()
    says = f"No class has LC on {one_line(source.splits[0])}."
    if len(first):
        best, least = first.idxmin(), first.idxmax()
        says = (
            f"Class {best} was learned most ({signed(float(first[best]))}) and class {least} least "
            f"({signed(float(first[least]))}) on {one_line(source.splits[0])}."
        )
    return Section(
        says,
        "A cell is the LC of that class's own mean loss: blue where the layer, or the iteration, "
        "taught the class, orange where it made it forget.",
        ("groups",),
        'SELECT split, layer, "group", sum(lc) AS lc FROM groups\nGROUP BY split, layer, "group"',
        figures,
        controls=(Control("Show", ["class by layer", "class by iteration"]),),
        time=True,
        notes=("Groups are the task's, most often the classes.", *source.coarse),
    )


def _by_class(found: Any, at: Any, width: int) -> tuple[list[int], Floats]:
    """The classes, and LC of each at the positions `at`, [classes, width]."""
    labels, row = np.unique(found["group"].to_numpy(), return_inverse=True)
    z = scattered((len(labels), width), (row, at), found["lc"].to_numpy(float))
    return labels.tolist(), z


def _class_layer(source: Source, store: Store, found: Any) -> Figure:
    found = found[found["layer"].isin(source.layers)]
    at = found["layer"].astype(str).map({name: i for i, name in enumerate(source.layers)})
    labels, z = _by_class(found, at.to_numpy(np.int64), len(source.layers))
    x, packed = [f"class {label}" for label in labels], store.add(z.T)
    limit = colour_limit(z, 100)
    trace = heat_of_lc(x, source.layers, packed.whole, limit, "whole run, %{x}")
    ticks = {"ticktext": [str(k) for k in labels], "tickvals": x, "type": "category"}
    layout = {"xaxis": axis("class", **ticks), "yaxis": rows(source.layers), "untimed": True}
    columns = [
        column("layer", [*source.layers], each=len(labels)),
        column("class", labels),
        column("lc", packed.flat, "loss"),
    ]
    return Figure([trace], layout, bars_height(len(source.layers), 20, 240), columns, z.size)


def _class_time(source: Source, store: Store, found: Any) -> Figure:
    labels, z = _by_class(found, found["col"].to_numpy(np.int64), len(source.starts))
    names = [f"class {label}" for label in labels]
    packed, x = store.add(z), store.add(source.starts)
    trace = heat_of_lc(store.put(along(source)), names, packed.whole, colour_limit(z))
    layout = {"xaxis": STEP, "yaxis": rows(names)}
    columns = [
        column("class", labels, each=len(source.starts)),
        column("start_step", x.whole, "step"),
        column("lc", packed.flat, "loss"),
    ]
    return Figure([trace], layout, bars_height(len(names), 22, 240), columns, z.size)
