"""Curves along the run: loss, cumulative LC, shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lcray.analyses import shares as helping
from lcray.analyses import trajectories as cumulative
from lcray.analyses.requirements import split_of
from lcray.errors import InapplicableError, UsageError, suggest
from lcray.figures.data.reconstruction import reconstruction
from lcray.figures.matplotlib.styling import (
    FAINT,
    HELPS,
    HURTS,
    INK,
    LOSS,
    OTHER,
    THIRD,
    axis,
    label,
    panels,
    shortened,
)
from lcray.figures.palette import by_depth
from lcray.tables.reading.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _rebuilt(results: Results, split: str, points: int) -> pd.DataFrame:
    frame: pd.DataFrame = reconstruction(results, points=points).to_pandas()
    return frame[frame["split"] == split]


def loss(
    results: Results, ax: Any = None, *, split: str | None = None, points: int = 1000
) -> NDArray[Any]:
    """The loss and its reconstruction from LC, and below them the gap between the two.

    Args:
        results: the output; needs `intervals`.
        ax: two axes; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        points: the most steps.

    Returns:
        The two axes.
    """
    split = split_of(results, split)
    frame = _rebuilt(results, split, points)
    upper, lower = found = panels(ax, 2, (3, 1))
    upper.plot(frame["step"], frame["loss"], color=FAINT, linewidth=2.5, label="measured")
    upper.plot(frame["step"], frame["reconstructed"], color=HELPS, label="from LC", linestyle="--")
    upper.legend(frameon=False)
    label(upper, f"Loss and its reconstruction from LC, {split}", y="loss")
    lower.plot(frame["step"], frame["gap"], color=THIRD)
    lower.axhline(0, color=INK, linewidth=0.8)
    lower.set(xlabel="step", ylabel=f"gap ({LOSS})")
    return found


def first_order(
    results: Results, ax: Axes | None = None, *, split: str | None = None, points: int = 1000
) -> Axes:
    """The loss, and its reconstructions by the rule and by the gradient at each start alone.

    Args:
        results: the output; needs `intervals`, and a rule with a node at 0.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        points: the most steps.
    """
    split = split_of(results, split)
    frame = _rebuilt(results, split, points)
    rule = results.plan.settings.rule
    if frame["first_order"].isna().all():
        raise InapplicableError(
            f"there is no first-order LC: rule {rule} has no node at 0; analyze with another"
        )
    ax = axis(ax)
    ax.plot(frame["step"], frame["loss"], color=FAINT, linewidth=2.5, label="measured")
    ax.plot(frame["step"], frame["reconstructed"], "--", color=HELPS, label=rule)
    ax.plot(frame["step"], frame["first_order"], ":", color=OTHER, label="first order")
    label(ax, f"First-order LC and the rule, {split}", "step", "loss")
    ax.legend(frameon=False)
    return ax


def trajectories(
    results: Results,
    ax: Axes | None = None,
    *,
    split: str | None = None,
    layers: Sequence[str] | None = None,
    points: int = 1000,
) -> Axes:
    """Cumulative LC of layers, dark to light from the first to the last; dashed if LC > 0.

    Args:
        results: the output; needs `layers`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        layers: names of the layers to draw; None for all.
        points: the most steps.
    """
    split = split_of(results, split, "layers")
    frame = cumulative.trajectories(results, points=points).to_pandas()
    frame = frame[(frame["split"] == split) & (frame["layer"] != "")]
    known = list(dict.fromkeys(frame["layer"].astype(str)))
    chosen = known if layers is None else list(layers)
    for name in chosen:
        if name not in known:
            raise UsageError(suggest(name, known, "layer"))
    ax = axis(ax)
    ax.axhline(0, color=INK, linewidth=0.8)
    for name, colour in zip(chosen, by_depth(len(chosen)), strict=True):
        here = frame[frame["layer"] == name]
        dash = "--" if here["lc"].iloc[-1] > 0 else "-"
        ax.plot(here["step"], here["lc"], dash, color=colour, label=shortened(name, 24))
    text = f"Cumulative LC of layers, {split}"
    label(ax, text, "step", f"cumulative LC ({LOSS})", "dashed: hurts over the run")
    if len(chosen) <= 12:
        ax.legend(frameon=False, fontsize="small")
    return ax


def shares(
    results: Results,
    ax: Axes | None = None,
    *,
    split: str | None = None,
    layer: str = "",
    window: int | None = None,
) -> Axes:
    """The shares of parameters that help and that hurt, window by window.

    The band contains the share of helping in 95 % of the resamplings of the window's intervals: how
    much the share would vary in other stretches of the same process.

    Args:
        results: the output; needs `layers`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        layer: its name; empty for the network.
        window: width in steps; None for a fiftieth of the run.
    """
    split = split_of(results, split, "layers")
    steps = results.plan.steps
    width = max(1, (steps[-1] - steps[0]) // 50) if window is None else window
    found = helping.shares(results, window=width).to_pandas()
    here = found[(found["split"] == split) & (found["resolution"] == "window")]
    if here.empty:
        raise InapplicableError(f"no interval of split {split!r} has LC")
    known = list(dict.fromkeys(here["layer"].astype(str)))
    if layer not in known:
        raise UsageError(suggest(layer, known, "layer"))
    frame = here[here["layer"] == layer]
    ax = axis(ax)
    middle = (frame["first_step"] + frame["end_step"]).to_numpy() / 2
    ax.axhline(0.5, color=FAINT, linewidth=0.8)
    for name, colour, dash in (("helping", HELPS, "-"), ("hurting", HURTS, "--")):
        ax.plot(middle, frame[name], dash, color=colour, label=name)
    banded = bool(frame["helping_low"].notna().any())
    if banded:
        low, high = (frame[f"helping_{end}"].to_numpy(np.float64) for end in ("low", "high"))
        ax.fill_between(middle, low, high, color=HELPS, alpha=0.2, linewidth=0)
    text = f"Shares of parameters that help and hurt, {split}" + (
        f", {shortened(layer)}" if layer else ""
    )
    small = "band: helping in 95% of resamplings" if banded else ""
    label(ax, text, "step", "share of parameters", small)
    ax.legend(frameon=False)
    return ax
