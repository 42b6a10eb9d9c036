"""Sections about layers over the run: totals, splits side by side, Fisher information."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lcray.analyses.information import fisher as fisher_finding
from lcray.analyses.requirements import require
from lcray.analyses.series import Floats
from lcray.analyses.windows import RUN
from lcray.errors import InapplicableError, one_line
from lcray.figures.html.charts import LC, LEGEND, axis, hover, line, marks, rows
from lcray.figures.html.sections import (
    LOSS,
    MATERIAL,
    Figure,
    Section,
    bars_height,
    category,
    count,
    listed,
    percent,
    plain,
    plotted,
    signed,
)
from lcray.figures.html.source import Source
from lcray.figures.html.store import Store, column

_SHARES = {"lc_share": "LC", "true_share": "true Fisher", "empirical_share": "empirical Fisher"}
_SHAPES = ("circle", "diamond", "square", "triangle-up", "x", "star")


def run_totals(source: Source) -> tuple[Floats, Floats]:
    """LC of each layer over the run and its bound, [S, L]; NaN if there is no bound.

    If an interval lacks LC in one layer alone, the finding `layer_totals` leaves the interval out;
    these sums keep the interval's other layers.
    """
    lc, error = source.by_layer["lc"], source.by_layer["lc_error"]
    lacking = (np.isfinite(lc) & ~np.isfinite(error)).any(axis=2)
    return source.totals, np.where(lacking, np.nan, np.nansum(error, axis=2))


def totals(source: Source, store: Store) -> Section:
    """LC of each layer over the run."""
    every, within = run_totals(source)
    figures = {str(s): _bars(source, store, every[s], within[s]) for s in range(len(source.splits))}
    lc = source.totals[0]
    order = np.argsort(lc)
    says = "No layer lowered the loss; "
    if lc[order[0]] < 0:
        says = (
            f"{one_line(source.layers[order[0]])} lowered the loss most ({signed(lc[order[0]])}); "
        )
    says += _hurting(source, lc, within[0])
    left_out = f"Left out: {count(source.left_out, 'buffer')} whose LC is 0 at every iteration."
    note = (
        "Whiskers are bounds: the possible errors of the quadrature, summed over the intervals. "
        "They are about this run; `lcray compare` is for other seeds."
        if np.isfinite(within).any()
        else f"No whiskers: rule {source.results.plan.settings.rule} has no lower rule on the same "
        "gradients, from which to estimate its error."
    )
    return Section(
        says,
        "Bars to the left (blue) helped, bars to the right (orange, marked ▲) hurt; all of them "
        "add up to Σ LC.",
        ("layers",),
        "SELECT split, layer, sum(lc) AS lc FROM layers GROUP BY split, layer ORDER BY lc",
        figures,
        notes=(note, left_out) if source.left_out else (note,),
    )


def _bars(source: Source, store: Store, lc: Floats, bound: Floats) -> Figure:
    known = {layer.name: layer.numel for layer in source.results.plan.layers}
    sizes = [known[name] for name in source.layers]
    bar: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "y": [plotted(name) for name in source.layers],
        "x": store.put(lc),
        "marker": {"color": ["@hurts" if value > 0 else "@helps" for value in lc]},
        "customdata": [[f"{n:,}", _within(b)] for n, b in zip(sizes, bound, strict=True)],
        "hovertemplate": hover(
            "%{y}",
            "whole run",
            f"LC %{{x:.4g}} ({LOSS})%{{customdata[1]}}",
            "%{customdata[0]} elements",
        ),
    }
    if np.isfinite(bound).any():
        whisker = {"type": "data", "array": store.put(bound), "thickness": 1.2, "width": 3}
        bar["error_x"] = {**whisker, "color": "@ink"}
    layout = {
        "xaxis": LC,
        "yaxis": rows(source.layers),
        "annotations": [_value(i, value) for i, value in enumerate(lc)],
        "margin": {"r": 90},
        "bargap": 0.3,
    }
    columns = [
        column("layer", [*source.layers]),
        column("lc", store.put(lc), "loss"),
        column("lc_bound", store.put(bound), "loss"),
        column("verdict", [_verdict(v, b) for v, b in zip(lc, bound, strict=True)]),
        column("elements", store.put(np.array(sizes, np.int64))),
    ]
    return Figure([bar], layout, bars_height(len(lc)), columns, len(lc))


def _value(row: int, lc: float) -> dict[str, Any]:
    """The number at the right end of a bar."""
    place = {"xref": "paper", "x": 1.01, "y": row, "xanchor": "left", "showarrow": False}
    if lc > 0:
        return {**place, "text": f"{signed(lc)} ▲", "font": {"color": "@hurts_text"}}
    return {**place, "text": signed(lc), "font": {"color": "@muted"}}


def _verdict(lc: float, bound: float) -> str:
    """Helps, hurts, or neither if LC is within its bound; without a bound, LC alone decides."""
    if abs(lc) <= bound or not lc:
        return "neither"
    return "hurts" if lc > 0 else "helps"


def _hurting(source: Source, lc: Floats, bound: Floats) -> str:
    """The layers that hurt in total; those within their bound are named separately."""
    above = [int(i) for i in np.argsort(-lc) if lc[i] > 0]
    clear = [source.layers[i] for i in above if not lc[i] <= bound[i]]
    within = [source.layers[i] for i in above if lc[i] <= bound[i]]
    if not above:
        return "no layer hurts in total."
    if not clear:
        end = "ends" if len(within) == 1 else "end"
        return f"{listed(within)} {end} above 0, within the bound."
    verb = "hurts" if len(clear) == 1 else "hurt"
    more = f", {listed(within)} within the bound" if within else ""
    return f"{listed(clear)} {verb} in total{more}."


def _within(bound: float) -> str:
    return f", known to ±{plain(bound, 2)}" if bound == bound else ""


def splits(source: Source, store: Store) -> Section:
    """LC of each layer, with one mark per split."""
    if len(source.splits) < 2:
        raise InapplicableError(
            "the output has one split: give the task another, such as val, and analyze into a new "
            "output"
        )
    values = dict(zip(source.splits, source.totals, strict=True))
    figure = dots(store, [*source.layers], values)
    train, other = source.totals[0], source.totals[1]
    large = np.abs(train - other) >= MATERIAL * abs(train.sum())
    apart = [source.layers[i] for i in np.flatnonzero((train < 0) & (other > 0) & large)]
    names = [one_line(name) for name in source.splits]
    does = "lowers" if len(apart) == 1 else "lower"
    says = (
        f"{listed(apart)} {does} the {names[0]} loss and not the {names[1]} loss: "
        "that is memorising."
        if apart
        else f"No layer lowers the {names[0]} loss and raises the {names[1]} loss by more than "
        f"{percent(MATERIAL, 1)} of the change."
    )
    return Section(
        says,
        "Each row has one mark per split: left of 0 helped that split's loss, right of 0 hurt it. "
        "Marks that are far apart show layers that learned for one split alone.",
        ("layers",),
        "SELECT split, layer, sum(lc) AS lc FROM layers GROUP BY split, layer ORDER BY layer, "
        "split",
        {"": figure},
        by_split=False,
        title=f"{names[0].capitalize()} and {listed(names[1:])}",
    )


def dots(store: Store, names: list[str], values: dict[str, Floats], *, of: str = "") -> Figure:
    """One row per layer, with one mark for each of `values` [L], joined by a line.

    Values are LC, or percentages `of` something.
    """
    n = len(names)
    table = np.stack([*values.values()])
    joined_x: list[float | None] = []
    joined_y: list[int | None] = []
    for i in range(n):
        some = table[:, i][np.isfinite(table[:, i])]
        if len(some):
            joined_x += [float(some.min()), float(some.max()), None]
            joined_y += [i, i, None]
    more: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
    traces = [line(joined_x, joined_y, "", "@rest", "", **more)]
    columns = [column("layer", names)]
    seen = "%{fullData.name} %{x:.4g}" + (" %" if of else f" ({LOSS})")
    for k, (name, found) in enumerate(values.items()):
        reference = store.put(found)
        size = 9 if n <= 30 else 7
        marker = {"color": category(k), "symbol": _SHAPES[k % 6], "size": size}
        text = hover("%{text}", "whole run", seen)
        said = {"text": [plotted(row) for row in names], "name": plotted(name)}
        traces.append(marks(reference, [*range(n)], marker, text, **said))
        columns.append(column(name, reference, "%" if of else "loss"))
    layout = {
        "xaxis": axis(f"{of} (%)", zeroline=True) if of else LC,
        "yaxis": {"names": names, "range": [n - 0.5, -0.5], "rows": True},
        "legend": {**LEGEND, "y": 1.0},
    }
    return Figure(traces, layout, bars_height(n) + 20, columns, n)


def fisher(source: Source, store: Store) -> Section:
    """Shares of LC next to shares of the Fisher information."""
    require(source.results, "fisher")
    last = source.results.plan.steps[-1]
    frame = fisher_finding(source.results, window=last + 1).to_pandas()
    frame = frame[frame["window"] == RUN]
    if not len(frame):
        raise InapplicableError(
            "no step of the run has Fisher information: give --fisher a "
            "smaller number, and analyze into a new output"
        )
    figures = {}
    for s, split in enumerate(source.splits):
        here = frame[frame["split"] == split]
        shares = {
            name: 100 * here[key].to_numpy(float)
            for key, name in _SHARES.items()
            if key == "lc_share" or here[key].notna().any()
        }
        names = [str(name) for name in here["layer"]]
        figures[str(s)] = dots(store, names, shares, of="share of all layers")
    return Section(
        _fisher_says(frame[frame["split"] == source.splits[0]]),
        "Shares of the sum over layers. A layer with much Fisher information and little LC matters "
        "to the output, but did not change the loss much in this run.",
        ("fisher", "layers"),
        "SELECT split, layer, avg(trace_true) AS trace_true,\n"
        "  avg(trace_empirical) AS trace_empirical\nFROM fisher GROUP BY split, layer",
        figures,
        notes=(
            f"Means over {count(int(frame['n_steps'].max()), 'step')} of the run. Fisher "
            "information has no sign, and changes when weights are rescaled; LC does not.",
        ),
    )


def _fisher_says(frame: pd.DataFrame) -> str:
    key = "true_share" if frame["true_share"].notna().any() else "empirical_share"
    if not frame[key].notna().any():
        return "The share of each layer in LC and in the trace of the Fisher information."
    top = frame.sort_values(key, ascending=False, kind="stable").iloc[0]
    return (
        f"{one_line(str(top['layer']))} has {percent(float(top[key]), 1, 2)} of the Fisher "
        f"information and {percent(float(top['lc_share']), 1, 2)} of LC."
    )
