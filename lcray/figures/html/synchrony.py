"""Sections about common learning: peaks of layers, and classes with layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from lcray.analyses.synchrony import coincidences, peaks_of_learning
from lcray.errors import InapplicableError, one_line
from lcray.figures.data.grouping import total
from lcray.figures.html.along_the_run import STEP, along, heat_trace
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

Floats = NDArray[np.float64]

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
        rows = pairs[pairs["split"] == split]
        figures[f"{s}.1"] = _matrix_figure(store, rows, parameters[:MOST_LAYERS])
    first = pairs[(pairs["split"] == source.splits[0]) & (pairs["a"] != pairs["b"])]
    sure = first[first["p_adjusted"] < 0.05]
    n = len(first) // 2
    return Section(
        "synchrony",
        "Do layers learn at the same iterations?",
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
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": store.put((steps + ends) / 2),  # the middle of the interval
        "y": [int(i) for i in at],
        "text": said,
        "customdata": store.put(lc),
        "marker": {
            "color": "@helps",
            "symbol": "line-ns",
            "size": 11,
            "line": {"width": 2, "color": "@helps"},
        },
        "hovertemplate": "%{text}<br>peak of learning, LC %{customdata:.4g} "
        f"({LOSS})<extra></extra>",
    }
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


def _matrix_figure(store: Store, rows: Any, layers: list[str]) -> Figure:
    rows = rows[rows["a"].isin(layers) & rows["b"].isin(layers)]
    n = len(layers)
    place = {name: i for i, name in enumerate(layers)}
    i, j = (rows[k].astype(str).map(place).to_numpy(np.int64) for k in ("a", "b"))
    extra = np.full((n, n), np.nan)
    together, expected = (rows[k].to_numpy(float) for k in ("coincidences", "expected"))
    extra[i, j] = together - expected
    extra[np.diag_indices(n)] = np.nan
    limit = float(np.nanmax(np.abs(extra))) if np.isfinite(extra).any() else 1.0
    trace = {
        "type": "heatmap",
        "x": [plotted(name) for name in layers],
        "y": [plotted(name) for name in layers],
        "z": store.put(extra),
        "zmin": -(limit or 1.0),
        "zmax": limit or 1.0,
        "colorscale": "@contrast",
        "colorbar": {
            "title": {"text": "shared peaks above chance", "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
        },
        "hovertemplate": "%{y} and %{x}<br>whole run<br>%{z:.3g} shared peaks above chance"
        "<extra></extra>",
    }
    layout = {
        "xaxis": {"names": layers, "tickangle": -60},
        "yaxis": {"names": layers, "autorange": "reversed"},
        "untimed": True,
    }
    columns = [
        column("layer", [str(name) for name in rows["a"]]),
        column("other", [str(name) for name in rows["b"]]),
        column("coincidences", store.put(together), "intervals"),
        column("expected", store.put(expected), "intervals"),
        column("p_adjusted", store.put(rows["p_adjusted"].to_numpy(float))),
    ]
    return Figure([trace], layout, min(900, 160 + 20 * n), columns, len(rows))


def classes(source: Source, store: Store) -> Section:
    """LC by class and layer, and by class along the run."""
    source.need("groups")
    over_run = source.sql(
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
        "classes",
        "Classes and layers",
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


def _grid(rows: Any, labels: list[int], at: Any, width: int) -> Floats:
    z = np.full((len(labels), width), np.nan)
    z[np.searchsorted(labels, rows["group"].to_numpy()), at] = rows["lc"].to_numpy(float)
    return z


def _limit(z: Floats, percentile: float) -> float:
    found = np.abs(z[np.isfinite(z)])
    return (float(np.percentile(found, percentile)) if len(found) else 0.0) or 1.0


def _class_layer(source: Source, store: Store, rows: Any) -> Figure:
    labels = sorted({int(g) for g in rows["group"]})
    rows = rows[rows["layer"].isin(source.layers)]
    at = rows["layer"].astype(str).map({name: i for i, name in enumerate(source.layers)})
    z = _grid(rows, labels, at.to_numpy(np.int64), len(source.layers)).T
    x = [f"class {label}" for label in labels]
    names = [*source.layers]
    trace = heat_trace(store.put(z), x, names, _limit(z, 100), across="whole run, %{x}")
    layout = {
        "xaxis": {
            "title": {"text": "class"},
            "ticktext": [str(k) for k in labels],
            "tickvals": x,
            "type": "category",
        },
        "yaxis": {"names": names, "autorange": "reversed"},
        "untimed": True,
    }
    columns = [
        column("layer", names, each=len(labels)),
        column("class", labels),
        column("lc", store.add(z).flat, "loss"),
    ]
    return Figure([trace], layout, bars_height(len(names), 20, 240), columns, z.size)


def _class_time(source: Source, store: Store, rows: Any) -> Figure:
    labels = sorted({int(g) for g in rows["group"]})
    z = _grid(rows, labels, rows["col"].to_numpy(np.int64), len(source.starts))
    names = [f"class {label}" for label in labels]
    packed, x = store.add(z), store.add(source.starts)
    trace = heat_trace(packed.whole, store.put(along(source)), names, _limit(z, 98))
    layout = {"xaxis": STEP, "yaxis": {"names": names, "autorange": "reversed"}}
    columns = [
        column("class", labels, each=len(source.starts)),
        column("start_step", x.whole, "step"),
        column("lc", packed.flat, "loss"),
    ]
    return Figure([trace], layout, bars_height(len(names), 22, 240), columns, z.size)
