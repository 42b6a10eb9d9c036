"""Sections about parts of layers: the distribution of |LC|, units, and single elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lcray.analyses.requirements import require
from lcray.analyses.series import scattered
from lcray.errors import InapplicableError, one_line
from lcray.figures.data.grouping import Floats, colour_limit, total
from lcray.figures.html.charts import (
    LC,
    LEGEND,
    STEP,
    axis,
    heat_of_lc,
    hover,
    in_hover,
    line,
    marks,
    rows,
)
from lcray.figures.html.sections import LOSS, Control, Figure, Section, plain
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store, column
from lcray.tables.reading.views import literal

#: Limits for a page: rows and cells of units, and the elements whose traces are shown.
MOST_UNITS, MOST_UNIT_CELLS, MOST_TRACES, MOST_LAYERS = 96, 600_000, 24, 60
_SIGNS = {-1: ("helping", "@helps", "circle"), 1: ("hurting", "@hurts", "diamond")}
_BINS = {"lower": "loss", "upper": "loss", "count": "", "density": "1/loss"}


def distribution(source: Source, store: Store) -> Section:
    """Histograms of |LC| on logarithmic axes, with the fitted Weibull densities."""
    require(source.results, "histograms", "fits")
    bins = source.results.sql_arrow(
        "SELECT split, layer, sign, bin, any_value(lower) AS lower, any_value(upper) AS upper, "
        "sum(count)::DOUBLE AS n FROM histograms WHERE sign <> 0 AND lower > 0 "
        "AND upper IS NOT NULL GROUP BY split, layer, sign, bin ORDER BY split, layer, sign, bin"
    ).to_pandas()
    fits = source.results.sql_arrow(
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
        says,
        "Both axes are logarithmic: marks are densities in bins of |LC| of single parameters and "
        "intervals, lines the fitted Weibull densities. A few parameters (far right) do most.",
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
    words: list[str] = []
    bins: list[Floats] = []
    for sign, (word, colour, symbol) in _SIGNS.items():
        if (split, layer, sign) not in groups:
            continue
        lower, upper, n = _merged(groups[split, layer, sign])
        density, middle = n / n.sum() / (upper - lower), np.sqrt(lower * upper)
        words += [word] * len(n)
        bins.append(np.stack([lower, upper, n, density]))
        text = hover(
            f"{in_hover(layer)}, {word}",
            "whole run, all iterations",
            f"|LC| %{{x:.3g}} ({LOSS})",
            "density %{y:.3g}, %{customdata:,} values",
        )
        marker = {"color": colour, "symbol": symbol, "size": 5}
        place = store.put(middle), store.put(density)
        traces.append(marks(*place, marker, text, customdata=store.put(n), name=word))
        shape, scale = (fits.get((split, layer, sign, key)) for key in ("k", "lambda"))
        if shape and scale and shape == shape and scale == scale:
            traces.append(_weibull(store, middle, density, (shape, scale), word, colour))
    powers = {"type": "log", "exponentformat": "power", "nticks": 8}
    layout = {
        "xaxis": axis("|LC| (loss)", **powers),
        "yaxis": axis("density", **powers),
        "legend": LEGEND,
    }
    found = np.concatenate(bins, axis=1) if bins else np.zeros((len(_BINS), 0))
    columns = [column("sign", words)]
    for (name, unit), values in zip(_BINS.items(), found, strict=True):
        columns.append(column(name, store.put(values), unit))
    return Figure(traces, layout, 420, columns, len(words))


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
    text = hover(f"Weibull density, {word}", f"k = {shape:.3g}, λ = {scale:.3g}")
    dash = "solid" if word == "helping" else "dash"
    name = f"Weibull, {word}: k = {shape:.2f}"
    return line(store.put(at), store.put(y), name, colour, text, dash=dash)


def units(source: Source, store: Store) -> Section:
    """LC of units by iteration, layer by layer."""
    require(source.results, "units")
    present = source.results.sql_arrow(
        "SELECT layer, count(DISTINCT unit) AS n FROM units "
        f"WHERE split = {literal(source.splits[0])} GROUP BY layer"
    ).to_pandas()
    sizes = dict(zip(present["layer"].astype(str), present["n"], strict=True))
    layers = [name for name in source.layers if sizes.get(name, 0) > 1][:MOST_LAYERS]
    if not layers:
        raise InapplicableError(f"no layer has LC of several units on {source.splits[0]}")
    n_rows = sum(min(sizes[name], MOST_UNITS) for name in layers)
    columns = max(20, min(len(source.starts), MOST_UNIT_CELLS // n_rows))
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
    split = literal(source.splits[0])
    largest = (
        "SELECT layer, unit FROM units "
        f"WHERE split = {split} GROUP BY layer, unit QUALIFY row_number() OVER "
        "(PARTITION BY layer ORDER BY sum(abs(lc) ORDER BY start_step) DESC NULLS LAST, unit) "
        f"<= {MOST_UNITS}"
    )
    found = source.results.sql_arrow(
        f"{source.grid.sql}, largest AS ({largest}) "
        f"SELECT layer::VARCHAR AS layer, unit, col // {each} AS col, {total('lc')} "
        "FROM units JOIN grid USING (start_step) JOIN largest USING (layer, unit) "
        f"WHERE split = {split} GROUP BY ALL ORDER BY ALL"
    ).to_pandas()
    return dict(iter(found.groupby("layer")))


def _unit_figure(source: Source, store: Store, found: pd.DataFrame, each: int) -> Figure:
    starts, edges = source.starts[::each], np.append(source.starts[::each], source.ends[-1:])
    kept, row = np.unique(found["unit"].to_numpy(np.int64), return_inverse=True)
    place = row, found["col"].to_numpy(np.int64)
    z = scattered((len(kept), len(starts)), place, found["lc"].to_numpy(float))
    packed, x = store.add(z), store.add(starts)
    names = [f"unit {u}" for u in kept]
    columns = [
        column("unit", store.put(kept), each=len(starts)),
        column("start_step", x.whole, "step"),
        column("lc", packed.flat, "loss"),
    ]
    traces = [heat_of_lc(store.put(edges), names, packed.whole, colour_limit(z))]
    layout = {"xaxis": STEP, "yaxis": rows(names, sparse=True)}
    height = max(240, min(620, 70 + 14 * len(kept)))
    return Figure(traces, layout, height, columns, z.size)


def traces(source: Source, store: Store) -> Section:
    """Weight, gradient and LC of some elements along the run."""
    require(source.results, "traces")
    split = literal(source.splits[0])
    chosen = source.results.sql_arrow(
        "WITH sums AS (SELECT layer::VARCHAR AS layer, index, sum(lc ORDER BY step) AS lc "
        f"FROM traces WHERE split = {split} GROUP BY ALL), ranked AS (SELECT *, "
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
        f"(layer = {literal(layer)} AND index = {index})"
        for layer, index in zip(big["layer"], big["index"], strict=True)
    )
    found = source.results.sql_arrow(
        f"SELECT layer::VARCHAR AS layer, index, step, weight, gradient, lc FROM traces "
        f"WHERE split = {split} AND ({listing}) ORDER BY ALL"
    ).to_pandas()
    groups = dict(iter(found.groupby(["layer", "index"])))
    figures, options = {}, []
    for k, (layer, index, lc) in enumerate(big[["layer", "index", "lc"]].itertuples(index=False)):
        steps, end = groups[layer, index], int(source.ends[-1])
        figures[str(k)] = _trace_figure(store, f"{layer}[{index}]", steps, source.each, end)
        verb = "helps" if lc < 0 else "hurts"
        options.append(f"{one_line(layer)}[{index}] {verb}, Σ LC {plain(lc, 2)}")
    return Section(
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


def _trace_figure(store: Store, name: str, steps: pd.DataFrame, each: int, end: int) -> Figure:
    step, lc = steps["step"].to_numpy(np.int64), steps["lc"].to_numpy(float)
    kept = np.arange(0, len(step), each)
    sums = np.add.reduceat(np.nan_to_num(lc), kept)
    sums[np.array([not np.isfinite(lc[a : a + each]).any() for a in kept])] = np.nan
    x = store.put(step[kept])
    weight, gradient = (store.put(steps[k].to_numpy(float)[kept]) for k in ("weight", "gradient"))
    lc_sums = store.put(sums)

    def text(what: str, unit: str) -> str:
        return hover(in_hover(name), "step %{x}", f"{what} %{{y:.4g}} ({unit})")

    slope = text("gradient", "loss/parameter")
    bars = {
        "type": "bar",
        "x": x,
        "offset": 0,  # a bar begins at its interval's first step
        "y": lc_sums,
        "yaxis": "y3",
        "marker": {"color": ["@hurts" if value > 0 else "@helps" for value in sums]},
        "name": "LC",
        "hovertemplate": text("LC", LOSS),
    }
    made = [
        line(x, weight, "weight", "@ink", text("weight", "parameter"), width=1.8),
        line(x, gradient, "gradient", "@s2", slope, width=1.8, yaxis="y2"),
        bars,
    ]
    layout = {
        "xaxis": {**STEP, "anchor": "y3", "range": [int(step[0]), end]},
        "yaxis": axis("weight", domain=[0.7, 1], nticks=4),
        "yaxis2": axis("gradient", domain=[0.36, 0.64], nticks=4, zeroline=True),
        "yaxis3": {**LC, "domain": [0, 0.3], "nticks": 4},
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
