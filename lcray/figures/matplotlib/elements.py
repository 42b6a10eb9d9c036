"""A few elements step by step."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from lcray.analyses.requirements import split_of
from lcray.analyses.tidy import notes_of
from lcray.figures.data.tracks import tracks as traced
from lcray.figures.matplotlib.styling import INK, LOSS, label, legend_beside, panels, shortened
from lcray.figures.palette import by_depth
from lcray.tables.reading.results import Results


def tracks(
    results: Results, layer: str, ax: Any = None, *, split: str | None = None, count: int = 4
) -> NDArray[Any]:
    """Weight, gradient and LC of the traced elements of a layer that move the loss most.

    Args:
        results: the output; needs `traces`.
        layer: its name.
        ax: three axes; None for a new figure.
        split: its name; None for ``train``, else the plan's first.
        count: number of elements.

    Returns:
        The three axes.
    """
    split = split_of(results, split)
    table = traced(results, layer, split=split, count=count)
    frame = table.to_pandas()
    found = panels(ax, 3)
    indices = list(dict.fromkeys(frame["index"]))
    units = (("weight", "weight"), ("gradient", "gradient"), ("lc", f"LC ({LOSS})"))
    for at, (column, name) in zip(found, units, strict=True):
        at.axhline(0, color=INK, linewidth=0.6)
        for index, colour in zip(indices, by_depth(len(indices)), strict=True):
            here = frame[frame["index"] == index]
            at.plot(here["step"], here[column], color=colour, label=f"[{index}]")
        at.set_ylabel(name)
    small = notes_of(table)[0].replace("elements with the greatest sum of", "by")
    text = f"Elements of {shortened(layer)}, {split}"
    label(found[0], text, y=units[0][1], note=small)
    found[-1].set_xlabel("step")
    if len(indices) <= 8:
        legend_beside(found[0])
    return found
