"""Axes and traces that several sections have in common, in Plotly's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lcray.figures.html.sections import LOSS, plotted

#: A legend above the chart.
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


STEP = axis("step")
LC = axis("LC (loss)", zeroline=True)


def rows(names: Sequence[str], **more: Any) -> dict[str, Any]:
    """A vertical axis of named rows, from the top down."""
    return {"names": [*names], "autorange": "reversed", **more}


def hover(*lines: str) -> str:
    """The text that a reader sees at a point."""
    return "<br>".join(lines) + "<extra></extra>"


def in_hover(name: str) -> str:
    """A name inside the text of `hover`, where braces have a meaning."""
    return plotted(name).replace("{", "&#123;")


def line(
    x: Any,
    y: Any,
    name: str,
    colour: str,
    seen: str,
    *,
    width: float = 2,
    dash: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A curve, solid unless `dash` is given; `seen` is from `hover`."""
    style = {"color": colour, "width": width} | ({"dash": dash} if dash else {})
    base = {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": name, "line": style}
    return {**base, "hovertemplate": seen, **more}


def marks(x: Any, y: Any, marker: dict[str, Any], seen: str, **more: Any) -> dict[str, Any]:
    """Points; `seen` is from `hover`."""
    base = {"type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker}
    return {**base, "hovertemplate": seen, **more}


def heat(
    x: Any,
    y: Sequence[str],
    z: Any,
    limit: float,
    seen: str,
    *,
    colours: str = "@diverging",
    bar: str = "LC (loss)",
) -> dict[str, Any]:
    """A heat map with diverging colours about 0 that end at ±`limit`, and named rows."""
    return {
        "type": "heatmap",
        "x": x,
        "y": [plotted(name) for name in y],
        "z": z,
        "zmin": -limit,
        "zmax": limit,
        "colorscale": colours,
        "colorbar": {
            "title": {"text": bar, "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".2~g",
        },
        "hovertemplate": seen,
    }


def heat_of_lc(
    x: Any, y: Sequence[str], z: Any, limit: float, across: str = "steps %{customdata}"
) -> dict[str, Any]:
    """A heat map of LC.

    Along the run, `x` has the edges of the columns, one more than there are columns: a cell reaches
    from the first step of its interval to the last. The page turns `customdata` into these edges.
    """
    return heat(x, y, z, limit, hover("%{y}", across, f"LC %{{z:.4g}} ({LOSS})"))
