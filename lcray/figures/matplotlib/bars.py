"""Bars by layer: LC over the run, LC on two splits, and shares of the Fisher information."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

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
    legend_above,
    literal,
    name_rows,
    note,
    title,
)
from lcray.tables.reading.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHISKERS = "whiskers: what the quadrature may be off"


def layer_totals(results: Results, ax: Axes | None = None, *, split: str | None = None) -> Axes:
    """LC of every layer over the run, with the bound of its quadrature error.

    Bars of layers that hurt in total are hatched, and marked where LC exceeds the bound.

    Args:
        results: the output; needs `layers`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
    """
    require(results, "layers")
    split = split_of(results, split)
    # one window in addition to the run; only the run is drawn
    found = totals.layer_totals(results, windows={"all": ":"}).to_pandas()
    here = (found["split"] == split) & (found["window"] == RUN) & (found["layer"] != "")
    frame = found[here].reset_index(drop=True)
    if frame.empty:
        raise InapplicableError(f"no interval of split {split!r} has LC")
    ax = axis(ax)
    lc, places = frame["lc"].to_numpy(), np.arange(len(frame))
    _signed_bars(ax, places, lc)
    bounded = _whiskers(ax, places, lc, frame["lc_bound"].to_numpy())
    for place in np.flatnonzero(frame["hurts"] > 0):
        ax.annotate("hurts", (0, float(place)), (-3, 0), **_beside("right"))
    ax.set_xlabel(f"LC over the run ({LOSS})")
    name_rows(ax, list(frame["layer"].astype(str)))
    title(ax, f"LC by layer, {split}")
    note(ax, f"{_WHISKERS}; hatched: LC > 0" if bounded else "hatched: LC > 0")
    return ax


def _whiskers(ax: Axes, places: Any, lc: Any, bound: Any) -> bool:
    """Bars of LC with their bounds, [L] each; returns whether any layer has a bound."""
    known = np.isfinite(bound)
    ax.errorbar(lc[known], places[known], xerr=bound[known], fmt="none", ecolor=INK, elinewidth=0.8)
    return bool(known.any())


def _beside(side: str) -> dict[str, Any]:
    return {
        "textcoords": "offset points",
        "ha": side,
        "va": "center",
        "fontsize": "small",
        "color": HURTS,
    }


def _signed_bars(ax: Axes, places: Any, lc: Any) -> None:
    bars = ax.barh(places, lc, 0.7, color=np.where(lc > 0, HURTS, HELPS).tolist())
    for bar, value in zip(bars, lc, strict=True):
        if value > 0:
            bar.set_hatch(HATCH)
            bar.set_edgecolor("white")
    ax.axvline(0, color=INK, linewidth=0.8)


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
    sides = ((str(frame["train"].iloc[0]), "train", HELPS, None), (chosen, "other", OTHER, HATCH))
    for k, (name, side, colour, hatch) in enumerate(sides):
        lc, bound = (frame[f"lc_{side}{end}"].to_numpy() for end in ("", "_bound"))
        places = np.arange(len(frame)) + 0.38 * (k - 0.5)
        ax.barh(places, lc, 0.36, color=colour, hatch=hatch, edgecolor="white", label=literal(name))
        bounded = _whiskers(ax, places, lc, bound)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_xlabel(f"LC over the run ({LOSS})")
    name_rows(ax, list(frame["layer"].astype(str)))
    title(ax, "Learning against memorising")
    if bounded:
        ax.set_xlabel(f"{ax.get_xlabel()}\n{_WHISKERS}")
    legend_above(ax, 2)
    return ax


def fisher(results: Results, ax: Axes | None = None, *, split: str | None = None) -> Axes:
    """Each layer's share of the network's LC, next to its shares of the Fisher traces.

    Args:
        results: the output; needs `layers` and `fisher`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
    """
    require(results, "layers", "fisher")
    split = split_of(results, split)
    found = information.fisher(results, windows={"all": ":"}).to_pandas()
    frame = found[(found["split"] == split) & (found["window"] == RUN)].reset_index(drop=True)
    sides = [
        ("LC", "lc_share", HELPS, None),
        ("Fisher, true", "true_share", OTHER, HATCH),
        ("Fisher, empirical", "empirical_share", THIRD, "...."),
    ]
    sides = [side for side in sides if frame[side[1]].notna().any()]
    ax = axis(ax)
    thick = 0.8 / max(1, len(sides))
    for k, (name, column, colour, hatch) in enumerate(sides):
        places = np.arange(len(frame)) + thick * (k - (len(sides) - 1) / 2)
        share = pd.to_numeric(frame[column]).to_numpy()
        ax.barh(
            places, share, 0.95 * thick, color=colour, hatch=hatch, edgecolor="white", label=name
        )
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_xlabel("share of all layers")
    name_rows(ax, list(frame["layer"].astype(str)))
    title(ax, f"Fisher information beside LC, {split}")
    legend_above(ax, len(sides))
    return ax
