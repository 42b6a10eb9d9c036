"""Several outputs side by side: the same numbers, with the same colours and scales."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from lcray.analyses.closure import closures
from lcray.analyses.shares import ratio
from lcray.analyses.titles import WHAT_HAPPENED
from lcray.errors import one_line
from lcray.figures.data.grouping import Floats, colour_limit, cumulative
from lcray.figures.html.along_the_run import along, loss_curves
from lcray.figures.html.charts import LEGEND, STEP, axis, heat_of_lc, hover, line, rows
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

_KEYS = ("run", "layer", "start_step")
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
    each = [dict(settings(one.results.plan, one.n_intervals)) for one in sources]
    facts = []
    for label in each[0]:
        values = [one[label] for one in each]
        facts.append([label, *values, "differs" if len(set(values)) > 1 else ""])
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


def _figure(
    names: Sequence[str],
    store: Store,
    curves: Sequence[Floats],
    xs: Sequence[Any],
    what: str,
    title: str,
    unit: str = LOSS,
) -> Figure:
    """One line per run, and a tidy table of curves of different lengths."""
    text = hover("%{fullData.name}", "step %{x}", f"{what} %{{y:.4g}} ({unit})")
    traces = [
        line(store.put(x), store.put(y), plotted(name), category(k), text, dash=_DASHES[k % 6])
        for k, (name, x, y) in enumerate(zip(names, xs, curves, strict=True))
    ]
    layout = {"xaxis": STEP, "yaxis": axis(title), "legend": LEGEND}
    run = np.repeat(np.array(names, object), [len(x) for x in xs]).tolist()
    columns = [
        column("run", run),
        column("step", store.put(np.concatenate(xs)), "step"),
        column(what.replace(" ", "_"), store.put(np.concatenate(curves)), unit),
    ]
    return Figure(traces, layout, 380, columns, len(run))


def _curves(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    xs = [along(source) for source in sources]
    found = [loss_curves(source) for source in sources]
    losses, gaps = ([curves[i][0] for curves in found] for i in (0, 2))
    figures = {
        "0": _figure(names, store, losses, xs, "measured loss", "measured loss"),
        "1": _figure(names, store, gaps, xs, "gap so far", "gap so far (loss)"),
    }
    changes = [float(np.nansum(source.intervals["loss_change"][0])) for source in sources]
    said = "; ".join(
        f"{name} {percent(abs(float(gap[-1])), abs(change), 2)}"
        for name, gap, change in zip(names, gaps, changes, strict=True)
    )
    return Section(
        f"Gap in the end, of the change: {said}.",
        "One line per run. The gap is Σ LC so far minus the measured change.",
        ("intervals",),
        "SELECT split, end_step, loss_end, gap FROM intervals ORDER BY split, start_step",
        figures,
        by_split=False,
        controls=(Control("Show", ["loss", "gap"]),),
        id="loss",
        title="Loss, and how well LC adds up to it",
    )


def _layers(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    layers = list(dict.fromkeys(name for source in sources for name in source.layers))
    values = {}
    for source, name in zip(sources, names, strict=True):
        lc = dict(zip(source.layers, source.totals[0], strict=True))
        values[name] = np.array([lc.get(layer, np.nan) for layer in layers])
    grid = np.stack([*values.values()])
    some = np.isfinite(grid).all(axis=0)
    apart = [
        layers[i] for i in np.flatnonzero(some & (grid.min(axis=0) < 0) & (grid.max(axis=0) > 0))
    ]
    verb = "helps" if len(apart) == 1 else "help"
    return Section(
        f"{listed(apart)} {verb} in one run and hurt in another."
        if apart
        else "Every layer that all runs have has the same sign in all of them."
        if some.any()
        else "No layer is in all runs.",
        "One mark per run: left of 0 helped, right of 0 hurt. `lcray compare` has p-values, from "
        "six runs on.",
        ("layers",),
        "SELECT split, layer, sum(lc) AS lc FROM layers GROUP BY split, layer",
        {"": dots(store, layers, values)},
        by_split=False,
        id="layers",
        title="Loss change allocated to each layer",
    )


def _heat_maps(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    cells = np.concatenate([source.by_layer["lc"][0].ravel() for source in sources])
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": [], "margin": {"t": 24}}
    tables: list[pd.DataFrame] = []
    each = [bars_height(len(source.layers), 14, 150) + 20 for source in sources]
    top, whole = 0.0, float(sum(each))
    for k, (source, name) in enumerate(zip(sources, names, strict=True)):
        n = "" if k == 0 else str(k + 1)
        lc, layers = source.by_layer["lc"][0], source.layers
        trace = heat_of_lc(store.put(along(source)), layers, store.put(lc), colour_limit(cells))
        trace |= {"xaxis": f"x{n}", "yaxis": f"y{n}", "showscale": k == 0, "name": plotted(name)}
        trace["hovertemplate"] = "%{fullData.name}<br>" + trace["hovertemplate"]
        traces.append(trace)
        low = top + each[k] / whole
        room = 52 / whole
        layout[f"xaxis{n}"] = {"anchor": f"y{n}"} | (STEP if k == len(names) - 1 else {})
        layout["annotations"].append(_caption(plotted(name), 1 - top))
        domain = [max(0.0, 1 - low + room), 1 - top]
        layout[f"yaxis{n}"] = rows(layers, domain=domain, anchor=f"x{n}")
        top = low
        index = pd.MultiIndex.from_product(([name], layers, source.starts), names=_KEYS)
        tables.append(pd.DataFrame({"lc": lc.ravel()}, index).reset_index())
    table = pd.concat(tables)
    columns = [
        column("run", table["run"].tolist()),
        column("layer", table["layer"].tolist()),
        column("start_step", store.put(table["start_step"].to_numpy()), "step"),
        column("lc", store.put(table["lc"].to_numpy()), "loss"),
    ]
    notes = [note for source in sources for note in source.coarse]
    return Section(
        "LC of layers by step, with one scale of colours for all runs.",
        "Blue cells lowered the loss, orange ones raised it; colours reach to percentile 98 of "
        "|LC| over all runs.",
        ("layers",),
        "SELECT split, layer, start_step, lc FROM layers ORDER BY ALL",
        {"": Figure(traces, layout, int(whole), columns, len(table))},
        by_split=False,
        notes=tuple(dict.fromkeys(notes)),
        id="heat-map",
        title="Every layer at every iteration",
    )


def _caption(name: str, y: float) -> dict[str, Any]:
    """The name of a run, above its heat map."""
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": y, "xanchor": "left"}
    return {**place, "yanchor": "bottom", "text": name, "showarrow": False}


def _shares(sources: Sequence[Source], names: Sequence[str], store: Store) -> Section:
    curves = []
    for source in sources:
        counts = [source.by_layer[f"n_{k}"][0] for k in ("helping", "hurting", "zero")]
        sums = np.nansum(counts, axis=1)
        curves.append(100 * ratio(sums[0], sums.sum(axis=0)))
    xs = [source.starts for source in sources]
    lc = [cumulative(source.intervals["lc"])[0] for source in sources]
    ends = [along(source) for source in sources]
    return Section(
        "Σ LC so far, and the share of parameters that help at each iteration.",
        "One line per run.",
        ("layers", "intervals"),
        "SELECT split, start_step,\n"
        "  sum(n_helping) / sum(n_helping + n_hurting + n_zero) AS helping\n"
        "FROM layers GROUP BY split, start_step ORDER BY ALL",
        {
            "0": _figure(
                names, store, curves, xs, "parameters helping", "parameters helping (%)", "%"
            ),
            "1": _figure(names, store, lc, ends, "LC so far", "LC so far (loss)"),
        },
        by_split=False,
        controls=(Control("Show", ["share helping", "Σ LC so far"]),),
        id="shares",
        title="Progress, and how many parameters help",
    )
