"""The distribution of |LC| on logarithmic axes, with fitted distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lcray.analyses.requirements import layer_of, split_of
from lcray.errors import InapplicableError, UsageError, suggest
from lcray.figures.data.densities import densities
from lcray.figures.matplotlib.styling import HELPS, HURTS, LOSS, axis, label, shortened
from lcray.statistics.families import FAMILIES
from lcray.tables.reading.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = dict(zip((f.name for f in FAMILIES), ("-", "-.", "--", ":"), strict=True))
_LEAST = 1e-3  # times the lowest observed density: fits are not drawn below it


def distribution(
    results: Results,
    ax: Axes | None = None,
    *,
    split: str | None = None,
    layer: str = "",
    fits: Sequence[str] = ("weibull", "lognormal"),
    per_octave: int = 4,
) -> Axes:
    """The density of ln |LC| of helping and hurting elements over the run, with fits as lines.

    Args:
        results: the output; needs `histograms`.
        ax: where to draw; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        layer: its name; empty for the network.
        fits: of weibull, exponential, lognormal and generalized_gaussian.
        per_octave: bins per octave: 1, 2, 4 or 8.
    """
    split = split_of(results, split, "histograms")
    for name in fits:
        if name not in _DASHES:
            raise UsageError(suggest(name, _DASHES, "distribution"))
    if layer:
        layer_of(results, layer, "histograms", results.plan.detail_layers)
    frame = densities(results, per_octave=per_octave).to_pandas()
    frame = frame[(frame["split"] == split) & (frame["layer"] == layer)]
    if frame.empty:
        raise InapplicableError(f"table 'histograms' has nothing but zeros here: {split}, {layer}")
    ax = axis(ax)
    floor = _LEAST * frame["density"].min()
    for sign, colour, marker, word in ((-1, HELPS, "o", "helps"), (1, HURTS, "^", "hurts")):
        here = frame[frame["sign"] == sign]
        middle = np.sqrt(here["lower"] * here["upper"]).to_numpy()
        ax.plot(middle, here["density"], marker, color=colour, markersize=3, alpha=0.6, label=word)
        for name in fits:
            line = here[name].where(here[name] > floor)
            known = name.replace("_", " ") if sign < 0 else None
            ax.plot(middle, line, _DASHES[name], color=colour, label=known)
    ax.set(xscale="log", yscale="log")
    text = f"Distribution of |LC|, {split}" + (f", {shortened(layer)}" if layer else "")
    below = f"|LC| of an element at an interval ({LOSS})"
    label(ax, text, below, "density of ln |LC|", "lines: maximum-likelihood fits")
    ax.legend(frameon=False, fontsize="small")
    return ax
