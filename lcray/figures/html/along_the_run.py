"""Sections along the run: the loss, the heat map, and cumulative LC."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.errors import one_line
from lcray.figures.data.grouping import Floats, colour_limit, cumulative
from lcray.figures.html.charts import LEGEND, STEP, axis, heat_of_lc, hover, line, rows
from lcray.figures.html.sections import (
    LOSS,
    Control,
    Figure,
    Section,
    bars_height,
    depths,
    listed,
    percent,
    plain,
    plotted,
)
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store, column

_HIGHLIGHTED = 6
#: Percentiles of |LC| at which the colours of a heat map may end.
PERCENTILES = (98, 90, 95, 99.5, 100)


def along(source: Source) -> NDArray[np.int64]:
    """Steps of the points between columns, [B + 1]."""
    return np.append(source.starts[:1], source.ends)


def loss(source: Source, store: Store) -> Section:
    """The measured loss, its reconstruction from LC, and the difference."""
    figures = {}
    x = store.add(along(source))
    measured, rebuilt, gap = loss_curves(source)
    known = np.isfinite(source.intervals["loss_start"][:, 0])
    for s in range(len(source.splits)):
        what = "loss" if known[s] else "loss change"
        figures[str(s)] = _loss_figure(store, x, (measured[s], rebuilt[s], gap[s]), what)
    worst = float(np.abs(gap[0]).max())
    change = abs(float(np.nansum(source.intervals["loss_change"][0])))
    bad = np.nansum(source.intervals["n_bad"]) > 0
    note = "Where an interval has no LC, its measured change is used instead."
    return Section(
        f"Adding up the LC of all parameters gives back the {one_line(source.splits[0])} loss to "
        f"within {plain(worst, 2)}, {percent(worst, change, 2)} of its change.",
        "The grey line is the measured loss, the dashes are the first loss plus all LC so far; the "
        "lower panel has their difference, the gap, on a scale of its own.",
        ("intervals",),
        "SELECT split, end_step, loss_end, gap,\n"
        "  sum(lc) OVER (PARTITION BY split ORDER BY start_step) AS lc_so_far,\n"
        "  sum(gap) OVER (PARTITION BY split ORDER BY start_step) AS gap_so_far\n"
        "FROM intervals ORDER BY split, start_step",
        figures,
        time=True,
        notes=(*((note,) if bad else ()), *source.coarse),
    )


def loss_curves(source: Source) -> tuple[Floats, Floats, Floats]:
    """Measured loss, first loss plus LC so far, and their difference, each [S, B + 1].

    As in `lcray.figures.reconstruction`; where the first loss is not known, from 0 on.
    """
    values = source.intervals
    first = values["loss_start"][:, :1]
    losses = np.concatenate([first, values["loss_end"]], axis=1)
    measured = np.where(np.isfinite(first), losses, cumulative(values["loss_change"]))
    gap = cumulative(values["gap"])
    return measured, measured + gap, gap


def _loss_figure(store: Store, x: Any, curves: tuple[Any, ...], what: str) -> Figure:
    measured, rebuilt, gap = (store.put(values) for values in curves)
    text = hover("step %{x}", f"%{{fullData.name}} %{{y:.5g}} ({LOSS})")
    filled: dict[str, Any] = {
        "yaxis": "y2",
        "fill": "tozeroy",
        "fillcolor": "@faint",
        "showlegend": False,
    }
    traces = [
        line(x.whole, measured, f"measured {what}", "@measured", text, width=4),
        line(x.whole, rebuilt, "first loss + Σ LC", "@s0", text, dash="dash"),
        line(x.whole, gap, "gap", "@s2", text, width=1.5, **filled),
    ]
    layout = {
        "xaxis": {**STEP, "anchor": "y2"},
        "yaxis": axis(what, domain=[0.36, 1]),
        "yaxis2": axis("gap", domain=[0, 0.24], zeroline=True, nticks=4),
        "legend": LEGEND,
    }
    columns = [
        column("step", x.whole, "step"),
        column(f"measured_{what.replace(' ', '_')}", measured, "loss"),
        column("first_loss_plus_lc", rebuilt, "loss"),
        column("gap", gap, "loss"),
    ]
    return Figure(traces, layout, 430, columns, x.shape[0])


def heat_map(source: Source, store: Store) -> Section:
    """LC by layer and interval."""
    lc, x = store.add(source.by_layer["lc"]), store.add(source.starts)
    edges = store.add(along(source))
    names, n = list(source.layers), len(source.starts)
    figures = {}
    for s in range(len(source.splits)):
        for p, percentile in enumerate(PERCENTILES):
            limit = colour_limit(source.by_layer["lc"][s], percentile)
            figures[f"{s}.{p}"] = Figure(
                [heat_of_lc(edges.whole, names, lc.matrix(s), limit)],
                {"xaxis": STEP, "yaxis": rows(names)},
                bars_height(len(names), 18, 240),
                [
                    column("layer", names, each=n),
                    column("start_step", x.whole, "step"),
                    column("lc", lc.row(s), "loss"),
                ],
                len(names) * n,
            )
    cells = source.by_layer["lc"][0]
    hurting = float(np.mean(cells[np.isfinite(cells)] > 0)) if np.isfinite(cells).any() else 0.0
    return Section(
        f"{percent(hurting, 1, 2)} of the cells hurt: there a layer raised the "
        f"{one_line(source.splits[0])} loss in that {source.span}.",
        "A row is a layer, from the input down; blue cells lowered the loss, orange ones raised "
        "it; cells near 0 have the colour of the page, and grey cells have no LC.",
        ("layers",),
        "SELECT split, layer, start_step, lc FROM layers ORDER BY ALL",
        figures,
        controls=(Control("Colours reach to", [_percentile(p) for p in PERCENTILES]),),
        time=True,
        notes=(
            "Colours are symmetric about 0 and reach to a percentile of |LC|; larger values have "
            "the last colour.",
            *source.coarse,
        ),
    )


def _percentile(p: float) -> str:
    return "the largest |LC|" if p == 100 else f"percentile {p:g} of |LC|"


def trajectories(source: Source, store: Store) -> Section:
    """Cumulative LC of the layers."""
    sums, x = store.add(cumulative(source.by_layer["lc"])), store.add(along(source))
    n = x.shape[0]
    names = list(source.layers)
    figures = {}
    for s in range(len(source.splits)):
        reach = np.abs(cumulative(source.by_layer["lc"][s])).max(axis=1)
        figures[str(s)] = Figure(
            trajectory_traces(names, reach, x.whole, [sums.row(s, i) for i in range(len(names))]),
            {
                "xaxis": STEP,
                "yaxis": axis("LC so far (loss)", zeroline=True),
                "legend": LEGEND,
            },
            400,
            [
                column("layer", names, each=n),
                column("step", x.whole, "step"),
                column("lc_so_far", sums.row(s), "loss"),
            ],
            len(names) * n,
        )
    order = np.argsort(source.totals[0])
    says = f"{listed([names[i] for i in order[:2]])} end lowest" if len(order) > 1 else names[0]
    return Section(
        f"{says}: what each layer had done to the {one_line(source.splits[0])} loss by each step.",
        "A line that falls helps at that time, one that rises hurts; its last point is the layer's "
        f"total. {_colouring(len(names))}",
        ("layers",),
        "SELECT split, layer, end_step,\n"
        "  sum(lc) OVER (PARTITION BY split, layer ORDER BY start_step) AS lc_so_far\n"
        "FROM layers ORDER BY ALL",
        figures,
        time=True,
        notes=source.coarse,
    )


def _colouring(n: int) -> str:
    """An explanation of the colours of n lines."""
    if n <= _HIGHLIGHTED:
        return "Colours go from dark to light in the order of the model."
    return (
        f"The {_HIGHLIGHTED} that reach furthest have colours, from dark to light in the order of "
        "the model; the others are grey: hover names them."
    )


def trajectory_traces(names: list[str], reach: Floats, x: Any, curves: list[Any]) -> list[Any]:
    """One line per layer; lines that reach furthest from 0 are on top, in colours."""
    order = np.argsort(-reach, kind="stable")
    chosen = np.sort(order[:_HIGHLIGHTED])
    colours = dict(zip(chosen.tolist(), depths(len(chosen)), strict=True))
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "solid")
    text = hover("%{fullData.name}", "step %{x}", f"LC so far %{{y:.4g}} ({LOSS})")
    traces = []
    for rank, i in reversed([*enumerate(order)]):
        shown = rank < _HIGHLIGHTED
        place = (x, curves[i], plotted(names[i]))
        more = {"legendrank": rank, "showlegend": shown}
        if shown:
            traces.append(line(*place, colours[i], text, dash=dashes[rank], **more))
        else:
            traces.append(line(*place, "@rest", text, width=1, **more))
    return traces
