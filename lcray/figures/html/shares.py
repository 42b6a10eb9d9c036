"""Sections about rates along the run: shares that help, and first-order LC and the rule's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcray.analyses.shares import ratio
from lcray.errors import InapplicableError, one_line
from lcray.figures.data.grouping import Floats, cumulative
from lcray.figures.html.along_the_run import along
from lcray.figures.html.charts import LEGEND, STEP, axis, hover, in_hover, line
from lcray.figures.html.sections import (
    LOSS,
    Control,
    Figure,
    Section,
    count,
    percent,
    plotted,
    signed,
)
from lcray.figures.html.source import Source
from lcray.figures.html.store import Packed, Store, column


def shares(source: Source, store: Store) -> Section:
    """The share of parameters that help, along the run and in windows."""
    counts = np.stack([source.by_layer[f"n_{k}"] for k in ("helping", "hurting", "zero")])
    whole = np.nansum(counts, axis=2, keepdims=True)
    counts = np.concatenate([whole, counts], axis=2)  # [3, S, 1 + L, B]
    all_of = counts.sum(axis=0)
    keep = [i for i in range(all_of.shape[1]) if np.nansum(all_of[:, i]) > 0]
    if not keep:
        raise InapplicableError("the tables count no parameters that help or hurt")
    counts, all_of = counts[:, :, keep], all_of[:, keep]
    found = store.add(100 * ratio(counts, all_of))  # [3, S, K, B]
    means, edges, width = _window_shares(source, counts)
    window, steps, x = store.add(means), store.add(edges), store.add(source.starts)
    names = [("all layers", *source.layers)[i] for i in keep]
    figures = {
        f"{s}.{k}": _share_figure(found, window, steps, x, (s, k), names[k], source.span)
        for s in range(len(source.splits))
        for k in range(len(names))
    }
    pairs = float(np.nansum(all_of[0, 0]))
    helping, hurting = (float(np.nansum(counts[i, 0, 0])) for i in (0, 1))
    return Section(
        f"On {one_line(source.splits[0])} {percent(helping, pairs)} of (parameter, iteration) "
        f"pairs help and {percent(hurting, pairs)} hurt.",
        f"Thin lines go through each {source.span}, thick ones are the shares in windows of "
        f"{count(width * source.each, 'interval')}. Helping and hurting leave a rest below 100 %: "
        "parameters whose LC is exactly 0.",
        ("layers",),
        "SELECT split, layer, start_step,\n"
        "  n_helping / (n_helping + n_hurting + n_zero) AS helping,\n"
        "  n_hurting / (n_helping + n_hurting + n_zero) AS hurting\n"
        "FROM layers WHERE kind = 'parameter' ORDER BY ALL",
        figures,
        controls=(Control("Layer", [one_line(name) for name in names]),),
        time=True,
        notes=source.coarse,
    )


def _window_shares(source: Source, counts: Floats) -> tuple[Floats, NDArray[np.int64], int]:
    """Shares in at most 20 windows of the grid: steps [3, S, K, 2 W], their edges [2 W], the width.

    The width is in columns of the grid.
    """
    width = max(1, -(-len(source.starts) // 20))
    first = np.arange(0, len(source.starts), width)
    sums = np.add.reduceat(np.nan_to_num(counts), first, axis=3)
    last = np.append(first[1:], len(source.starts)) - 1
    edges = np.column_stack([source.starts[first], source.ends[last]]).ravel()
    return np.repeat(100 * ratio(sums, sums.sum(axis=0)), 2, axis=3), edges, width


def _share_figure(
    found: Any, window: Any, steps: Any, x: Any, at: tuple[int, int], layer: str, span: str
) -> Figure:
    traces = []
    for i, (kind, colour, dash) in enumerate(
        (("helping", "@helps", "solid"), ("hurting", "@hurts", "dot"))
    ):
        text = hover(in_hover(layer), "step %{x}", f"{kind} %{{y:.1f}} % of parameters")
        thin, thick = found.row(i, *at), window.row(i, *at)
        name = f"{kind}, {span}"
        traces.append(line(x.whole, thin, name, colour, text, width=1, opacity=0.6))
        name, more = f"{kind}, window", {"hoverinfo": "skip"}
        traces.append(line(steps.whole, thick, name, colour, "", width=3, dash=dash, **more))
    layout = {
        "xaxis": STEP,
        "yaxis": axis("parameters (%)", rangemode="tozero"),
        "half": 50,
        "legend": LEGEND,
    }
    columns = [column("start_step", x.whole, "step")]
    kinds = ("helping", "hurting", "zero")
    columns += [column(kind, found.row(i, *at), "%") for i, kind in enumerate(kinds)]
    return Figure(traces, layout, 340, columns, x.shape[0])


def first_order(source: Source, store: Store) -> Section:
    """The loss change that the gradient at the start of each step would have predicted."""
    claimed = source.intervals["first_order_lc"]
    if not np.isfinite(claimed).any():
        raise InapplicableError(
            "the rule has no gradient at the start of an interval: analyze with --rule simpson "
            "into a new output"
        )
    x = store.add(along(source))
    curves = {
        "measured": cumulative(source.intervals["loss_change"]),
        "rule": cumulative(source.intervals["lc"]),
        "first order": cumulative(claimed),
    }
    rule = rule_name(source.results.plan.settings.rule)
    figures = {
        str(s): _claims(store, x, {name: values[s] for name, values in curves.items()}, rule)
        for s in range(len(source.splits))
    }
    ends = {name: float(values[0, -1]) for name, values in curves.items()}
    return Section(
        "The gradient at the start of each step would have claimed "
        f"{signed(ends['first order'])}, "
        f"{percent(ends['first order'], ends['measured'])} of the measured change; {rule} "
        "misses it by "
        f"{percent(abs(ends['rule'] - ends['measured']), abs(ends['measured']), 2)}.",
        "The dashes should lie on the line; the distance of the dots from it shows the gain from "
        "integrating along the step.",
        ("intervals",),
        "SELECT split, sum(loss_change) AS loss_change, sum(lc) AS lc,\n"
        "  sum(first_order_lc) AS first_order\nFROM intervals GROUP BY split",
        figures,
        time=True,
        notes=source.coarse,
        title=f"First-order LC compared with {rule}",
    )


def _claims(store: Store, x: Packed, curves: dict[str, Floats], rule: str) -> Figure:
    """Cumulative measured change, the rule's LC, and the first order's LC."""
    rows = {name: store.put(values) for name, values in curves.items()}
    style = {
        "measured": ("measured change", "@measured", "solid", 4),
        "rule": (f"Σ LC, {plotted(rule)}", "@s0", "dash", 2),
        "first order": ("first order, g(start)·Δ", "@s1", "dot", 2),
    }
    text = hover("step %{x}", f"%{{fullData.name}} %{{y:.4g}} ({LOSS})")
    traces = [
        line(x.whole, rows[key], name, colour, text, width=width, dash=dash)
        for key, (name, colour, dash, width) in style.items()
    ]
    layout = {
        "xaxis": STEP,
        "yaxis": axis("loss change so far", zeroline=True),
        "legend": LEGEND,
    }
    columns = [column("step", x.whole, "step")]
    columns += [column(key.replace(" ", "_"), rows[key], "loss") for key in rows]
    return Figure(traces, layout, 360, columns, x.shape[0])


def rule_name(rule: str) -> str:
    """The name of a quadrature rule, as in papers."""
    return {"simpson": "Simpson's rule (RK4)", "left": "the left rule"}.get(rule, one_line(rule))
