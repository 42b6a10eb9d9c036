"""Bars by layer: LC over the run, LC on two splits, and shares of the Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcray.analyses import information
from lcray.analyses import layer_totals as totals
from lcray.analyses import memorising as learning
from lcray.analyses.requirements import require, split_of
from lcray.analyses.windows import RUN
from lcray.errors import InapplicableError, UsageError, suggest
from lcray.figures.matplotlib.styling import (
    HATCH,
    HELPS,
    HURTS,
    INK,
    LOSS,
    OTHER,
    THIRD,
    axis,
    label,
    legend_above,
    literal,
    name_rows,
)
from lcray.tables.reading.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = ("train", "other")
_WHISKERS = "whiskers: bounds of the quadrature error"


def layer_totals(results: Results, ax: Axes | None = None, *, split: str | None = None) -> Axes:
    """LC of every layer over the run, with the bound of its quadrature error.

    Bars of layers that hurt in total are hatched, and marked where LC exceeds the bound.

    Args:
        results: the output; needs `layers`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
    """
    split = split_of(results, split, "layers")
    # one window in addition to the run; only the run is drawn
    found = totals.layer_totals(results, windows={"all": ":"}).to_pandas()
    here = (found["split"] == split) & (found["window"] == RUN) & (found["layer"] != "")
    frame = found[here].reset_index(drop=True)
    if frame.empty:
        raise InapplicableError(f"no interval of split {split!r} has LC")
    ax = axis(ax)
    lc, places = frame["lc"].to_numpy(), np.arange(len(frame))
    bars = ax.barh(places, lc, 0.7, color=np.where(lc > 0, HURTS, HELPS).tolist())
    for bar, value in zip(bars, lc, strict=True):
        if value > 0:
            bar.set(hatch=HATCH, edgecolor="white")
    ax.axvline(0, color=INK, linewidth=0.8)
    bounded = _whiskers(ax, places, lc, frame["lc_bound"].to_numpy())
    text: Any = {"textcoords": "offset points", "ha": "right", "va": "center", "color": HURTS}
    for place in np.flatnonzero(frame["hurts"] > 0):
        ax.annotate("hurts", (0, float(place)), (-3, 0), fontsize="small", **text)
    name_rows(ax, frame["layer"])
    small = f"{_WHISKERS}; hatched: LC > 0" if bounded else "hatched: LC > 0"
    label(ax, f"LC by layer, {split}", f"LC over the run ({LOSS})", note=small)
    return ax


def _whiskers(ax: Axes, places: Any, lc: Any, bound: Any) -> bool:
    """Bars of LC with their bounds, [L] each; returns whether any layer has a bound."""
    known = np.isfinite(bound)
    ax.errorbar(lc[known], places[known], xerr=bound[known], fmt="none", ecolor=INK, elinewidth=0.8)
    return bool(known.any())


def _groups(
    ax: Axes, sides: Sequence[tuple[str, Any, str, str | None]], room: float = 0.8
) -> list[Any]:
    """Bars of several quantities side by side, by row: name, values [L], colour and hatch each.

    Returns their places, [L] each.
    """
    thick = room / max(1, len(sides))
    found = []
    for k, (name, values, colour, hatch) in enumerate(sides):
        places = np.arange(len(values)) + thick * (k - (len(sides) - 1) / 2)
        look: Any = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name}
        ax.barh(places, values, 0.95 * thick, **look)
        found.append(places)
    ax.axvline(0, color=INK, linewidth=0.8)
    return found


def memorising(
    results: Results,
    ax: Axes | None = None,
    *,
    train: str | None = None,
    other: str | None = None,
) -> Axes:
    """LC of every layer on train and on another split, each with its bound.

    Args:
        results: the output; needs `layers` and two splits.
        ax: where to draw; None for a new figure.
        train: the split that was trained on; None for ``train``, else the plan's first.
        other: the split to compare with; None for the first other one.
    """
    require(results, "layers")
    found = learning.memorising(results, windows={"all": ":"}, train=train).to_pandas()
    others = list(dict.fromkeys(found["other"].astype(str)))
    if other is not None and other not in others:
        raise UsageError(suggest(other, others, "split"))
    if not others:
        raise InapplicableError("no interval has LC on train and on another split")
    chosen = others[0] if other is None else other
    here = (found["other"] == chosen) & (found["window"] == RUN) & (found["layer"] != "")
    frame = found[here & (found["resolution"] == "run")].reset_index(drop=True)
    ax = axis(ax)
    train_name = literal(str(frame["train"].iloc[0]))
    lc, bounds = ([frame[f"lc_{k}{end}"].to_numpy() for k in _SIDES] for end in ("", "_bound"))
    bars = [(train_name, lc[0], HELPS, None), (literal(chosen), lc[1], OTHER, HATCH)]
    bounded = False
    for places, side, bound in zip(_groups(ax, bars, 0.76), lc, bounds, strict=True):
        bounded = _whiskers(ax, places, side, bound)
    name_rows(ax, frame["layer"])
    below = f"LC over the run ({LOSS})" + (f"\n{_WHISKERS}" if bounded else "")
    label(ax, "Learning or memorising", below)
    legend_above(ax, 2)
    return ax


def fisher(results: Results, ax: Axes | None = None, *, split: str | None = None) -> Axes:
    """Each layer's share of the network's LC, next to its shares of the Fisher traces.

    Args:
        results: the output; needs `layers` and `fisher`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
    """
    split = split_of(results, split, "layers", "fisher")
    found = information.fisher(results, windows={"all": ":"}).to_pandas()
    frame = found[(found["split"] == split) & (found["window"] == RUN)].reset_index(drop=True)
    sides = [
        ("LC", "lc_share", HELPS, None),
        ("Fisher, true", "true_share", OTHER, HATCH),
        ("Fisher, empirical", "empirical_share", THIRD, "...."),
    ]
    sides = [side for side in sides if frame[side[1]].notna().any()]
    ax = axis(ax)
    _groups(ax, [(name, frame[column], *look) for name, column, *look in sides])
    name_rows(ax, frame["layer"])
    label(ax, f"Fisher information and LC, {split}", "share of all layers")
    legend_above(ax, len(sides))
    return ax
