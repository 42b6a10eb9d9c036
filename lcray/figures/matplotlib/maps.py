"""Matrices as maps, with diverging colours: zero is in the middle, the ends are at a percentile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from lcray.analyses import synchrony, tidy
from lcray.analyses.requirements import require, split_of
from lcray.errors import InapplicableError, UsageError
from lcray.figures.data.classes import class_layers as by_class
from lcray.figures.data.grouping import colour_limit
from lcray.figures.data.matrices import layer_matrix, unit_matrix
from lcray.figures.matplotlib.styling import (
    HURTS,
    INK,
    LOSS,
    MISSING,
    axis,
    diverging,
    label,
    literal,
    name_rows,
    shortened,
)
from lcray.tables.reading.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layer_map(
    results: Results,
    ax: Axes | None = None,
    *,
    split: str | None = None,
    columns: int = 200,
    percentile: float = 99.0,
) -> Axes:
    """LC of every layer by interval; layers that hurt over the run are marked.

    Args:
        results: the output; needs `layers`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        columns: the most; neighbouring intervals are summed.
        percentile: of |LC|, at which the colours end.
    """
    split = split_of(results, split)
    table = layer_matrix(results, columns=columns)
    frame = table.to_pandas()
    frame = frame[frame["split"] == split]
    names = list(dict.fromkeys(frame["layer"].astype(str)))
    grid, edges = _grid(frame, "layer", names)
    ax = axis(ax)
    hurting = np.flatnonzero(np.nansum(grid, axis=1) > 0)
    text = f"LC of layers, {split}" + (" (◂ hurts over the run)" if len(hurting) else "")
    _over_time(ax, text, grid, edges, percentile, table)
    name_rows(ax, names, np.arange(len(names)) + 0.5)
    look: Any = {"marker": "<", "s": 12, "color": HURTS, "clip_on": False, "zorder": 3}
    right = ax.get_yaxis_transform()
    ax.scatter(np.full(len(hurting), 1.0), hurting + 0.5, transform=right, **look)
    return ax


def unit_map(
    results: Results,
    layer: str,
    ax: Axes | None = None,
    *,
    split: str | None = None,
    columns: int = 200,
    percentile: float = 99.0,
) -> Axes:
    """LC of every unit of a layer by interval.

    Args:
        results: the output; needs `units`.
        layer: its name.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        columns: the most; neighbouring intervals are summed.
        percentile: of |LC|, at which the colours end.
    """
    split = split_of(results, split)
    table = unit_matrix(results, layer, split=split, columns=columns)
    frame = table.to_pandas()
    if frame.empty:
        raise InapplicableError(f"no interval of split {split!r} has LC of units of {layer!r}")
    units = sorted(set(frame["unit"]))
    grid, edges = _grid(frame, "unit", units)
    ax = axis(ax)
    from matplotlib.ticker import MaxNLocator

    text = f"LC of units, {shortened(layer)}, {split}"
    _over_time(ax, text, grid, edges, percentile, table, first=-0.5)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.invert_yaxis()
    ax.set_ylabel("unit")
    return ax


def class_layers(
    results: Results, ax: Axes | None = None, *, split: str | None = None, percentile: float = 100.0
) -> Axes:
    """LC of every class's own loss by layer, over the run.

    Args:
        results: the output; needs `groups`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        percentile: of |LC|, at which the colours end.
    """
    split = split_of(results, split)
    frame = by_class(results).to_pandas()
    frame = frame[frame["split"] == split]
    if frame.empty:
        raise InapplicableError(f"table 'groups' has no rows of split {split!r}")
    names = list(dict.fromkeys(frame["layer"].astype(str)))
    groups = sorted(set(frame["group"]))
    values = frame.pivot(index="layer", columns="group", values="lc").loc[names, groups].to_numpy()
    ax = axis(ax)
    edges = np.arange(len(groups) + 1) - 0.5
    _coloured(ax, edges, values, percentile, f"LC of the class's loss ({LOSS})")
    name_rows(ax, names, np.arange(len(names)) + 0.5)
    step = -(-len(groups) // 20)
    ax.set_xticks(np.arange(len(groups))[::step], [str(g) for g in groups[::step]])
    label(ax, f"LC of classes by layer, {split}", "class")
    return ax


def coincidences(
    results: Results, ax: Axes | None = None, *, split: str | None = None, kind: str = "layer"
) -> Axes:
    """Coincident peaks of pairs of layers, or of classes, minus the number expected by chance.

    Dots mark pairs whose adjusted p-value is below 0.05.

    Args:
        results: the output; needs `layers`, and `groups` for classes.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        kind: ``layer``, or ``group`` for classes.
    """
    require(results, "layers", *(["groups"] if kind == "group" else []))
    if kind not in ("layer", "group"):
        raise UsageError(f"kind {kind!r}: give 'layer' or 'group'")
    split = split_of(results, split)
    found = synchrony.coincidences(results).to_pandas()
    frame = found[(found["split"] == split) & (found["kind"] == kind) & found["group"].isna()]
    if frame.empty:
        raise InapplicableError(f"split {split!r} has no pairs of kind {kind!r}, or few intervals")
    names = list(dict.fromkeys(frame["a"].astype(str)))
    excess = frame.assign(excess=frame["coincidences"] - frame["expected"])
    excess.loc[excess["a"].astype(str) == excess["b"].astype(str), "excess"] = np.nan
    wide = excess.pivot(index="a", columns="b", values=["excess", "p_adjusted"])
    grids = [wide[name].loc[names, names].to_numpy(float) for name in ("excess", "p_adjusted")]
    ax = axis(ax)
    edges = np.arange(len(names) + 1)
    _coloured(ax, edges, grids[0], 100.0, "coincident peaks above chance", backwards=True)
    rows, across = np.nonzero(grids[1] < 0.05)
    ax.plot(across + 0.5, rows + 0.5, "o", color=INK, markeredgecolor="white", markersize=4)
    name_rows(ax, names, np.arange(len(names)) + 0.5)
    step = -(-len(names) // 40)
    ax.set_xticks((edges[:-1] + 0.5)[::step], [*map(literal, names[::step])], rotation=90)
    label(ax, f"Coincident peaks of learning, {split}", note="dots: p < 0.05, adjusted")
    return ax


def _grid(frame: pd.DataFrame, row: str, names: list[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """LC [rows, columns], and the steps at which columns begin and the last column ends."""
    wide = frame.pivot(index=row, columns="first_step", values="lc").reindex(index=names)
    edges = np.append(wide.columns.to_numpy(), frame["end_step"].max())
    return wide.to_numpy(np.float64), edges


def _over_time(
    ax: Axes,
    text: str,
    grid: NDArray[Any],
    edges: NDArray[Any],
    percentile: float,
    table: pa.Table,
    first: float = 0.0,
) -> None:
    _coloured(ax, edges, grid, percentile, f"LC of a column ({LOSS})", first)
    ends = [f"colours end at the {percentile:g}th percentile of |LC|"] if percentile < 100 else []
    added = [f"{note.rsplit(' of ', 1)[-1]} added up" for note in tidy.notes_of(table)]
    label(ax, text, "step", note="; ".join([*ends, *added]))


def _coloured(
    ax: Axes,
    edges: NDArray[Any],
    grid: NDArray[Any],
    percentile: float,
    name: str,
    first: float = 0.0,
    *,
    backwards: bool = False,
) -> None:
    """A map with its first row at `first`, and its scale, which has arrows if values are beyond."""
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile {percentile:g}: must be above 0 and at most 100")
    top = colour_limit(grid, percentile)
    rows = np.arange(grid.shape[0] + 1) + first
    colours: Any = {"cmap": diverging(backwards), "vmin": -top, "vmax": top}
    mesh = ax.pcolormesh(edges, rows, np.ma.masked_invalid(grid), rasterized=True, **colours)
    ax.set_facecolor(MISSING)
    beyond = bool((np.abs(grid) > top).any())
    figure: Any = ax.figure
    figure.colorbar(mesh, ax=ax, extend="both" if beyond else "neither", label=name)
