"""Sections about parts of layers: the distribution of |LC|, units, and single elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lcray.errors import InapplicableError, one_line
from lcray.figures.data.grouping import total
from lcray.figures.html.along_the_run import STEP, heat_trace
from lcray.figures.html.sections import LOSS, Control, Figure, Section, plain, plotted
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store, column
from lcray.tables.reading.views import literal

Floats = NDArray[np.float64]

#: Limits for a page: rows and cells of units, and the elements whose traces are shown.
MOST_UNITS, MOST_UNIT_CELLS, MOST_TRACES, MOST_LAYERS = 96, 600_000, 24, 60
_SIGNS = {-1: ("helping", "@helps", "circle"), 1: ("hurting", "@hurts", "diamond")}


def distribution(source: Source, store: Store) -> Section:
    """Histograms of |LC| on logarithmic axes, with the fitted Weibull densities."""
    source.need("histograms", "fits")
    bins = source.sql(
        "SELECT split, layer, sign, bin, any_value(lower) AS lower, any_value(upper) AS upper, "
        "sum(count)::DOUBLE AS n FROM histograms WHERE sign <> 0 AND lower > 0 "
        "AND upper IS NOT NULL GROUP BY split, layer, sign, bin ORDER BY split, layer, sign, bin"
    ).to_pandas()
    fits = source.sql(
        "SELECT split, layer, sign, parameter, value FROM fits "
        "WHERE \"window\" = -1 AND distribution = 'weibull'"
    ).to_pandas()
    bins, fits = (f.astype({"split": str, "layer": str}) for f in (bins, fits))
    present = set(bins["layer"])
    layers = [name for name in source.layers if name in present]
    if not layers:
        raise InapplicableError("no layer has LC other than 0")
    values = fits.set_index(["split", "layer", "sign", "parameter"])["value"].to_dict()
    groups = dict(iter(bins.groupby(["split", "layer", "sign"])))
    figures = {
        f"{s}.{k}": _density(store, split, name, groups, values)
        for s, split in enumerate(source.splits)
        for k, name in enumerate(layers)
    }
    shapes = [v for (sp, _, _, p), v in values.items() if p == "k" and sp == source.splits[0]]
    shapes = [v for v in shapes if v == v]
    says = "How |LC| of single parameters is distributed in each layer."
    if shapes:
        says = (
            f"Weibull shapes k lie between {plain(min(shapes), 2)} and {plain(max(shapes), 2)} on "
            f"{one_line(source.splits[0])}: "
            + (
                "every tail is heavier than exponential."
                if max(shapes) < 1
                else "below 1, tails are heavier than exponential."
            )
        )
    return Section(
        "distribution",
        "How |LC| is distributed",
        says,
        "Both axes are logarithmic: marks are densities in bins of |LC| of single parameters and "
        "intervals, lines the fitted Weibull densities. A few parameters far right do most.",
        ("histograms", "fits"),
        "SELECT split, layer, sign, lower, upper, sum(count) AS n FROM histograms\n"
        "GROUP BY split, layer, sign, lower, upper ORDER BY ALL",
        figures,
        controls=(Control("Layer", [one_line(name) for name in layers]),),
        notes=("Pairs of neighbouring bins are merged where there are many.",),
    )


def _density(
    store: Store, split: str, layer: str, groups: dict[Any, pd.DataFrame], fits: dict[Any, float]
) -> Figure:
    traces: list[dict[str, Any]] = []
    table: list[tuple[str, float, float, float, float]] = []
    for sign, (word, colour, symbol) in _SIGNS.items():
        rows = groups.get((split, layer, sign))
        if rows is None:
            continue
        lower, upper, n = _merged(rows)
        density, middle = n / n.sum() / (upper - lower), np.sqrt(lower * upper)
        table += zip([word] * len(n), lower, upper, n, density, strict=True)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": store.put(middle),
                "y": store.put(density),
                "customdata": store.put(n),
                "name": word,
                "marker": {"color": colour, "symbol": symbol, "size": 5},
                "hovertemplate": f"{plotted(layer).replace('{', '&#123;')}, {word}<br>whole run, "
                f"all iterations<br>|LC| %{{x:.3g}} ({LOSS})<br>density %{{y:.3g}}, "
                "%{customdata:,} values<extra></extra>",
            }
        )
        shape, scale = (fits.get((split, layer, sign, key)) for key in ("k", "lambda"))
        if shape and scale and shape == shape and scale == scale:
            traces.append(_weibull(store, middle, density, (shape, scale), word, colour))
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "|LC| (loss)"},
            "exponentformat": "power",
            "nticks": 8,
        },
        "yaxis": {
            "type": "log",
            "title": {"text": "density"},
            "exponentformat": "power",
            "nticks": 8,
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    words, *rest = zip(*table, strict=True) if table else ((), (), (), (), ())
    columns = [column("sign", [*words])]
    names = ("lower", "upper", "count", "density")
    units = ("loss", "loss", "", "1/loss")
    columns += [
        column(name, store.put(np.array(v, float)), unit)
        for name, v, unit in zip(names, rest, units, strict=True)
    ]
    return Figure(traces, layout, 420, columns, len(table))


def _merged(rows: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    """Edges and counts; neighbouring bins are merged until at most 80 are left."""
    number = rows["bin"].to_numpy(np.int64)
    merge = 1
    while len(np.unique(number // merge)) > 80:
        merge *= 2
    _, first = np.unique(number // merge, return_index=True)
    last = np.append(first[1:], len(number)) - 1
    lower, upper = rows["lower"].to_numpy(float)[first], rows["upper"].to_numpy(float)[last]
    return lower, upper, np.add.reduceat(rows["n"].to_numpy(float), first)


def _weibull(
    store: Store, x: Floats, density: Floats, fit: tuple[float, float], word: str, colour: str
) -> dict[str, Any]:
    shape, scale = fit
    at = np.geomspace(x[0], x[-1], 120)
    t = (at / scale) ** shape
    y = shape / at * t * np.exp(-t)
    y[y < density[density > 0].min() / 10] = np.nan  # a line far below all marks makes them small
    return {
        "type": "scatter",
        "mode": "lines",
        "x": store.put(at),
        "y": store.put(y),
        "name": f"Weibull, {word}: k = {shape:.2f}",
        "line": {"color": colour, "width": 2, "dash": "solid" if word == "helping" else "dash"},
        "hovertemplate": f"Weibull density, {word}<br>k = {shape:.3g}, λ = {scale:.3g}"
        "<extra></extra>",
    }


def units(source: Source, store: Store) -> Section:
    """LC of units by iteration, layer by layer."""
    source.need("units")
    present = source.sql(
        "SELECT layer, count(DISTINCT unit) AS n FROM units "
        f"WHERE split = {literal(source.splits[0])} GROUP BY layer"
    ).to_pandas()
    sizes = dict(zip(present["layer"].astype(str), present["n"], strict=True))
    layers = [name for name in source.layers if sizes.get(name, 0) > 1][:MOST_LAYERS]
    if not layers:
        raise InapplicableError(f"no layer has LC of several units on {source.splits[0]}")
    rows = sum(min(sizes[name], MOST_UNITS) for name in layers)
    columns = max(20, min(len(source.starts), MOST_UNIT_CELLS // rows))
    each = -(-len(source.starts) // columns)
    found = _unit_rows(source, each)
    figures = {
        str(k): _unit_figure(source, store, found[name], each) for k, name in enumerate(layers)
    }
    notes = [f"Split {one_line(source.splits[0])}."]
    if each > 1:
        notes.append(f"Each column adds up {each * source.each:,} intervals.")
    else:
        notes += source.coarse
    if any(sizes[name] > MOST_UNITS for name in layers):
        notes.append(f"Larger layers show the {MOST_UNITS} units with the largest Σ|LC|.")
    return Section(
        "units",
        "Units of a layer",
        "Which output channels or neurons of a layer learned, and when.",
        "A row is one unit, in order of its number; blue helped, orange hurt. Rows that stay "
        "empty belong to units that do nothing for the loss.",
        ("units",),
        "SELECT split, layer, unit, start_step, lc FROM units ORDER BY ALL",
        figures,
        by_split=False,
        controls=(Control("Layer", [one_line(name) for name in layers]),),
        time=True,
        notes=notes,
    )


def _unit_rows(source: Source, each: int) -> dict[str, pd.DataFrame]:
    """LC of the largest units by layer; `each` columns of the grid are summed into one."""
    split = source.splits[0].replace("'", "''")
    largest = (
        "SELECT layer, unit FROM units "
        f"WHERE split = '{split}' GROUP BY layer, unit QUALIFY row_number() OVER "
        "(PARTITION BY layer ORDER BY sum(abs(lc) ORDER BY start_step) DESC NULLS LAST, unit) "
        f"<= {MOST_UNITS}"
    )
    found = source.sql(
        f"{source.grid.sql}, largest AS ({largest}) "
        f"SELECT layer::VARCHAR AS layer, unit, col // {each} AS col, {total('lc')} "
        "FROM units JOIN grid USING (start_step) JOIN largest USING (layer, unit) "
        f"WHERE split = '{split}' GROUP BY ALL ORDER BY ALL"
    ).to_pandas()
    return dict(iter(found.groupby("layer")))


def _unit_figure(source: Source, store: Store, rows: pd.DataFrame, each: int) -> Figure:
    unit, starts = rows["unit"].to_numpy(np.int64), source.starts[::each]
    kept = np.unique(unit)
    z = np.full((len(kept), len(starts)), np.nan)
    at = rows["col"].to_numpy(np.int64)
    z[np.searchsorted(kept, unit), at] = rows["lc"].to_numpy(float)
    packed, x = store.add(z), store.add(starts)
    sizes_ = np.abs(z[np.isfinite(z)])
    limit = float(np.percentile(sizes_, 98)) if len(sizes_) else 0.0
    names = [f"unit {u}" for u in kept]
    layout = {
        "xaxis": STEP,
        "yaxis": {"names": names, "autorange": "reversed", "sparse": True},
    }
    columns = [
        column("unit", store.put(kept), each=len(starts)),
        column("start_step", x.whole, "step"),
        column("lc", packed.flat, "loss"),
    ]
    edges = store.put(np.append(starts, source.ends[-1:]))
    traces = [heat_trace(packed.whole, edges, names, limit or 1.0)]
    height = max(240, min(620, 70 + 14 * len(kept)))
    return Figure(traces, layout, height, columns, z.size)


def traces(source: Source, store: Store) -> Section:
    """Weight, gradient and LC of some elements along the run."""
    source.need("traces")
    split = source.splits[0].replace("'", "''")
    chosen = source.sql(
        "WITH sums AS (SELECT layer::VARCHAR AS layer, index, sum(lc ORDER BY step) AS lc "
        f"FROM traces WHERE split = '{split}' GROUP BY ALL), ranked AS (SELECT *, "
        "row_number() OVER (PARTITION BY layer ORDER BY lc, index) AS low, "
        "row_number() OVER (PARTITION BY layer ORDER BY lc DESC, index) AS high FROM sums) "
        "SELECT layer, index, lc, low = 1 AS helps FROM ranked WHERE low = 1 OR high = 1"
    ).to_pandas()
    order = {name: i for i, name in enumerate(source.layers)}
    big = chosen.assign(at=chosen["layer"].map(order), size=chosen["lc"].abs())
    big = big.sort_values("size", ascending=False, kind="stable").head(MOST_TRACES)
    big = big.sort_values(["at", "lc", "index"])
    if not len(big):
        raise InapplicableError("the table traces has no elements")
    listing = " OR ".join(
        f"(layer = '{str(layer).replace(chr(39), chr(39) * 2)}' AND index = {index})"
        for layer, index in zip(big["layer"], big["index"], strict=True)
    )
    found = source.sql(
        f"SELECT layer::VARCHAR AS layer, index, step, weight, gradient, lc FROM traces "
        f"WHERE split = '{split}' AND ({listing}) ORDER BY ALL"
    ).to_pandas()
    groups = dict(iter(found.groupby(["layer", "index"])))
    figures, options = {}, []
    for k, (layer, index, lc) in enumerate(big[["layer", "index", "lc"]].itertuples(index=False)):
        rows, end = groups[layer, index], int(source.ends[-1])
        figures[str(k)] = _trace_figure(store, f"{layer}[{index}]", rows, source.each, end)
        verb = "helps" if lc < 0 else "hurts"
        options.append(f"{one_line(layer)}[{index}] {verb}, Σ LC {plain(lc, 2)}")
    return Section(
        "traces",
        "Single parameters: oscillation",
        "Weight, gradient and LC of single traced parameters, step by step.",
        "Where the weight moves against the gradient, LC is below 0 (blue) and helps; where it "
        "moves on past the minimum, LC is above 0 (orange).",
        ("traces",),
        "SELECT split, layer, index, step, weight, gradient, lc FROM traces ORDER BY ALL",
        figures,
        by_split=False,
        controls=(Control("Parameter", options),),
        time=True,
        notes=(
            f"Split {one_line(source.splits[0])}; of each layer's traced sample the element that "
            "helped and the one that hurt most. lcray trace follows the extremes of all.",
            *source.coarse,
        ),
    )


def _trace_figure(store: Store, name: str, rows: pd.DataFrame, each: int, end: int) -> Figure:
    step = rows["step"].to_numpy(np.int64)
    kept = np.arange(0, len(step), each)
    lc = rows["lc"].to_numpy(float)
    sums = np.add.reduceat(np.nan_to_num(lc), kept)
    sums[np.array([not np.isfinite(lc[a : a + each]).any() for a in kept])] = np.nan
    x = store.put(step[kept])
    weight = store.put(rows["weight"].to_numpy(float)[kept])
    gradient = store.put(rows["gradient"].to_numpy(float)[kept])
    lc_sums = store.put(sums)
    shown = plotted(name).replace("{", "&#123;")
    line = {"type": "scatter", "mode": "lines", "x": x}
    colours = ["@hurts" if value > 0 else "@helps" for value in sums]
    made: list[dict[str, Any]] = [
        {**line, "y": weight, "line": {"color": "@ink", "width": 1.8}},
        {**line, "y": gradient, "yaxis": "y2", "line": {"color": "@s2", "width": 1.8}},
        {
            "type": "bar",
            "x": x,
            "offset": 0,  # a bar begins at its interval's first step
            "y": lc_sums,
            "yaxis": "y3",
            "marker": {"color": colours},
        },
    ]
    for trace, what, unit in zip(
        made, ("weight", "gradient", "LC"), ("parameter", "loss/parameter", LOSS), strict=True
    ):
        trace["name"] = what
        trace["hovertemplate"] = (
            f"{shown}<br>step %{{x}}<br>{what} %{{y:.4g}} ({unit})<extra></extra>"
        )
    layout = {
        "xaxis": {**STEP, "anchor": "y3", "range": [int(step[0]), end]},
        "yaxis": {"title": {"text": "weight"}, "domain": [0.7, 1], "nticks": 4},
        "yaxis2": {
            "title": {"text": "gradient"},
            "domain": [0.36, 0.64],
            "nticks": 4,
            "zeroline": True,
        },
        "yaxis3": {
            "title": {"text": "LC (loss)"},
            "domain": [0, 0.3],
            "nticks": 4,
            "zeroline": True,
        },
        "showlegend": False,
        "bargap": 0.1,
    }
    columns = [
        column("step", x, "step"),
        column("weight", weight, "parameter"),
        column("gradient", gradient, "loss/parameter"),
        column("lc", lc_sums, "loss"),
    ]
    return Figure(made, layout, 460, columns, len(kept))
