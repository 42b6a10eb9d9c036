"""Several outputs side by side: the same numbers, with the same colours and scales."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.analyses.closure import closures
from lcray.analyses.titles import WHAT_HAPPENED
from lcray.errors import one_line
from lcray.figures.data.grouping import cumulative
from lcray.figures.html.along_the_run import STEP, along, heat_trace, loss_curves
from lcray.figures.html.head import run_name, totals_table
from lcray.figures.html.layers import dots
from lcray.figures.html.page import links_to, render, table
from lcray.figures.html.sections import (
    LOSS,
    Control,
    Figure,
    Section,
    bars_height,
    category,
    count,
    listed,
    percent,
    plotted,
    signed,
)
from lcray.figures.html.source import Source, read_source
from lcray.figures.html.store import Store, column
from lcray.figures.html.totals import settings
from lcray.tables.reading.results import Results

Floats = NDArray[np.float64]

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def compared(results: Sequence[Results], page: Path) -> bytes:
    """The page of several outputs, for a file at `page`; raises as `lcray.report`."""
    sources, store = [read_source(one) for one in results], Store()
    names = distinct_names(results)
    sections = [
        _curves(sources, names, store),
        _layers(sources, names, store),
        _heat_maps(sources, names, store),
        _shares(sources, names, store),
    ]
    links = links_to(results[0].path, page, results[0].tables)
    title = f"{listed(names)} side by side"
    return render(title, _head(sources, names), sections, {"splits": [""]}, store, links)


def distinct_names(results: Sequence[Results]) -> list[str]:
    """A name for each output: its run's, or as much of its own path as distinguishes it."""
    names = [run_name(one) for one in results]
    if len(set(names)) == len(names):
        return names
    paths = [PurePosixPath(os.path.normpath(str(one.path))).parts for one in results]
    for n in range(1, max(map(len, paths)) + 1):
        names = [one_line("/".join(parts[-n:])) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _head(sources: Sequence[Source], names: Sequence[str]) -> str:
    found = [closures(source.results)[0] for source in sources]
    order = sorted(
        range(len(names)), key=lambda i: (found[i].lc != found[i].lc, found[i].loss_change)
    )
    best = order[0]
    rows = [dict(settings(one.results.plan, one.n_intervals)) for one in sources]
    facts = [
        [
            label,
            *(row[label] for row in rows),
            "differs" if len({r[label] for r in rows}) > 1 else "",
        ]
        for label in rows[0]
    ]
    other = [row[0] for row in facts if row[-1] and row[0] in ("Rule", "Precision", "BatchNorm")]
    warned = (
        f"<p class=warning>{escape(listed(other))} differ: LC of these outputs answers different "
        "questions.</p>"
        if other
        else ""
    )
    lede = (
        f"{names[best]} lowered its {one_line(found[best].split)} loss most, "
        f"{signed(found[best].loss_change)}; {names[order[-1]]} least, "
        f"{signed(found[order[-1]].loss_change)}."
    )
    header = ["setting", *names, ""]
    return (
        f"<header><p class=kicker>Loss change allocation, side by side</p>"
        f"<h1>{escape(count(len(names), 'run'))}</h1><p class=lede>{escape(lede)}</p>"
        f"<p class=reading>{escape(WHAT_HAPPENED)}</p></header>"
        f"{warned}<section><h2>Headline numbers, first split of each</h2>"
        f"{totals_table(found, names)}</section>"
        "<section><h2>Settings that decide the answer</h2>"
        f"{table(header, facts, 'words')}</section>"
    )


def _line(x: Any, y: Any, k: int, name: str, what: str, unit: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "name": plotted(name),
        "line": {"color": category(k), "width": 2, "dash": _DASHES[k % 6]},
        "hovertemplate": f"%{{fullData.name}}<br>step %{{x}}<br>{what} %{{y:.4g}} ({unit})"
        "<extra></extra>",
    }


def _legend() -> dict[str, Any]:
    return {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def _long(
    names: Sequence[str], xs: Sequence[Any], ys: Sequence[Any], store: Store, what: str, unit: str
) -> tuple[list[dict[str, Any]], int]:
    """A tidy table of curves of different lengths."""
    sizes = [len(x) for x in xs]
    run = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    columns = [
        column("run", run),
        column("step", store.put(np.concatenate(xs)), "step"),
        column(what, store.put(np.concatenate(ys)), unit),
    ]
    return columns, sum(sizes)


def _figure(
    sources: Sequence[Source],
    names: Sequence[str],
    store: Store,
    curves: Sequence[Floats],
    xs: Sequence[Any],
    what: str,
    unit: str = LOSS,
) -> Figure:
    traces = [
        _line(store.put(x), store.put(y), k, name, what, unit)
        for k, (name, x, y) in enumerate(zip(names, xs, curves, strict=True))
    ]
    layout = {
        "xaxis": STEP,
        "yaxis": {
            "title": {
                "text": what
                if what.endswith("loss")
                else f"{what} ({'%' if unit == '%' else 'loss'})"
            }
        },
        "legend": _legend(),
    }
    columns, rows = _long(names, xs, curves, store, what.replace(" ", "_"), unit)
    return Figure(traces, layout, 380, columns, rows)


def _curves(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    xs = [along(source) for source in sources]
    found = [loss_curves(source) for source in sources]
    figures = {
        str(i): _figure(sources, names, store, [curves[j][0] for curves in found], xs, what)
        for i, (j, what) in enumerate(((0, "measured loss"), (2, "gap so far")))
    }
    changes = [float(np.nansum(source.intervals["loss_change"][0])) for source in sources]
    closing = [
        percent(abs(float(gap[0, -1])), abs(change), 2)
        for (_, _, gap), change in zip(found, changes, strict=True)
    ]
    said = "; ".join(f"{name} {gap}" for name, gap in zip(names, closing, strict=True))
    return Section(
        "loss",
        "Loss, and how well LC adds up to it",
        f"Gap in the end, of the change: {said}.",
        "One line per run. The gap is Σ LC so far minus the measured change.",
        ("intervals",),
        "SELECT split, end_step, loss_end, gap FROM intervals ORDER BY split, start_step",
        figures,
        by_split=False,
        controls=(Control("Show", ["loss", "gap"]),),
    )


def _layers(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    rows = list(dict.fromkeys(name for source in sources for name in source.layers))
    values = {}
    for source, name in zip(sources, names, strict=True):
        lc = dict(zip(source.layers, source.totals[0], strict=True))
        values[name] = np.array([lc.get(row, np.nan) for row in rows])
    grid = np.stack([*values.values()])
    some = np.isfinite(grid).all(axis=0)
    apart = [
        rows[i] for i in np.flatnonzero(some & (grid.min(axis=0) < 0) & (grid.max(axis=0) > 0))
    ]
    verb = "helps" if len(apart) == 1 else "help"
    return Section(
        "layers",
        "Loss change allocated to each layer",
        f"{listed(apart)} {verb} in one run and hurt in another."
        if apart
        else "Every layer that all runs have has the same sign in all of them."
        if some.any()
        else "No layer is in all runs.",
        "One mark per run: left of 0 helped, right of 0 hurt. `lcray compare` has p-values, from "
        "six runs on.",
        ("layers",),
        "SELECT split, layer, sum(lc) AS lc FROM layers GROUP BY split, layer",
        {"": dots(store, rows, values)},
        by_split=False,
    )


def _heat_maps(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    cells = np.concatenate([source.by_layer["lc"][0].ravel() for source in sources])
    cells = np.abs(cells[np.isfinite(cells)])
    limit = (float(np.percentile(cells, 98)) if len(cells) else 0.0) or 1.0
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": [], "margin": {"t": 24}}
    columns = [[], [], [], []]  # type: list[list[Any]]
    each = [bars_height(len(source.layers), 14, 150) + 20 for source in sources]
    top, whole = 0.0, float(sum(each))
    for k, (source, name) in enumerate(zip(sources, names, strict=True)):
        n = "" if k == 0 else str(k + 1)
        trace = heat_trace(
            store.put(source.by_layer["lc"][0]), store.put(along(source)), [*source.layers], limit
        )
        trace |= {"xaxis": f"x{n}", "yaxis": f"y{n}", "showscale": k == 0, "name": plotted(name)}
        trace["hovertemplate"] = "%{fullData.name}<br>" + trace["hovertemplate"]
        traces.append(trace)
        low = top + each[k] / whole
        room = 52 / whole
        layout[f"xaxis{n}"] = {"anchor": f"y{n}"} | (STEP if k == len(names) - 1 else {})
        layout["annotations"].append(_caption(plotted(name), 1 - top))
        layout[f"yaxis{n}"] = {
            "names": [*source.layers],
            "autorange": "reversed",
            "domain": [max(0.0, 1 - low + room), 1 - top],
            "anchor": f"x{n}",
        }
        top = low
        size = source.by_layer["lc"][0].size
        columns[0] += [name] * size
        columns[1] += list(np.repeat(source.layers, len(source.starts)))
        columns[2].append(np.tile(source.starts, len(source.layers)))
        columns[3].append(source.by_layer["lc"][0].ravel())
    listing = [
        column("run", columns[0]),
        column("layer", [str(name) for name in columns[1]]),
        column("start_step", store.put(np.concatenate(columns[2])), "step"),
        column("lc", store.put(np.concatenate(columns[3])), "loss"),
    ]
    notes = [note for source in sources for note in source.coarse]
    return Section(
        "heat-map",
        "Every layer at every iteration",
        "LC of layers by step, with one scale of colours for all runs.",
        "Blue cells lowered the loss, orange ones raised it; colours reach to percentile 98 of "
        "|LC| over all runs.",
        ("layers",),
        "SELECT split, layer, start_step, lc FROM layers ORDER BY ALL",
        {"": Figure(traces, layout, int(whole), listing, len(columns[0]))},
        by_split=False,
        notes=tuple(dict.fromkeys(notes)),
    )


def _caption(name: str, y: float) -> dict[str, Any]:
    """The name of a run, above its heat map."""
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": y, "xanchor": "left"}
    return {**place, "yanchor": "bottom", "text": name, "showarrow": False}


def _shares(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    curves = []
    for source in sources:
        n = {
            k: np.nansum(source.by_layer[f"n_{k}"][0], axis=0)
            for k in ("helping", "hurting", "zero")
        }
        whole = n["helping"] + n["hurting"] + n["zero"]
        with np.errstate(invalid="ignore", divide="ignore"):
            curves.append(100 * n["helping"] / whole)
    xs = [source.starts for source in sources]
    lc = [cumulative(source.intervals["lc"])[0] for source in sources]
    ends = [along(source) for source in sources]
    return Section(
        "shares",
        "Progress, and how many parameters help",
        "Σ LC so far, and the share of parameters that help at each iteration.",
        "One line per run.",
        ("layers", "intervals"),
        "SELECT split, start_step,\n"
        "  sum(n_helping) / sum(n_helping + n_hurting + n_zero) AS helping\n"
        "FROM layers GROUP BY split, start_step ORDER BY ALL",
        {
            "0": _figure(sources, names, store, curves, xs, "parameters helping", "%"),
            "1": _figure(sources, names, store, lc, ends, "LC so far"),
        },
        by_split=False,
        controls=(Control("Show", ["share helping", "Σ LC so far"]),),
    )
