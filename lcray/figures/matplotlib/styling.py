"""The common parts of all figures: colours, axes, sizes and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcray.errors import LcrayError, UsageError, one_line
from lcray.figures.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELPS, HURTS, INK, FAINT = LIGHT.helps, LIGHT.hurts, LIGHT.ink, LIGHT.measured
MISSING = LIGHT.missing
OTHER, THIRD = LIGHT.categories[1:3]
HATCH = "////"
LOSS = "loss"
_MOST_NAMES = 40


class MissingPlotsError(LcrayError):
    """Matplotlib is not installed."""


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingPlotsError('figures need Matplotlib: pip install "lcray[plots]"') from error
    return pyplot


@contextmanager
def style(
    font_size: float = 8.0, width: float = 3.4, height: float | None = None
) -> Iterator[None]:
    """A context for figures of a paper: size, fonts and lines; it restores the old settings.

    Text stays text in PDF and SVG.

    Args:
        font_size: of labels, in points; ticks, legends and notes are one point smaller.
        width: of a new figure, in inches; 3.4 is a column of most journals.
        height: of a new figure, in inches; None for 0.7 of the width.

    Raises:
        UsageError: for sizes that are not above 0.
    """
    sizes = (font_size, width, height if height is not None else 0.7 * width)
    if min(sizes) <= 0:
        raise UsageError(f"style {sizes}: sizes must be above 0")
    _pyplot()
    import matplotlib

    small = max(1.0, font_size - 1)
    settings: Any = {
        "font.size": font_size,
        "axes.titlesize": font_size,
        "axes.labelsize": font_size,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "legend.fontsize": small,
        "figure.figsize": sizes[1:],
        "lines.linewidth": 1.0,
        "axes.linewidth": 0.6,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "savefig.dpi": 300,
    }
    with matplotlib.rc_context(settings):
        yield


def axis(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    made: Axes = _pyplot().subplots(layout="constrained")[1]
    return made


def panels(ax: Any, n: int, ratios: Sequence[float] | None = None) -> NDArray[Any]:
    """The axes in `ax`, one above the other, or the axes of a new figure, [n].

    Raises:
        UsageError: for another number of axes.
    """
    if ax is None:
        found = _pyplot().subplots(n, sharex=True, height_ratios=ratios, layout="constrained")[1]
    else:
        found = np.array(ax, dtype=object).ravel()
        if len(found) != n:
            raise UsageError(f"ax: the figure has {n} panels; give {n} axes")
    return np.asarray(found)


def label(ax: Axes, title: str, x: str = "", y: str = "", note: str = "") -> None:
    """A title at the upper left, names of the axes, and small text at the upper right."""
    ax.set_title(literal(title), loc="left", pad=14)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.annotate(
        note,
        (1, 1),
        (0, 2),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize="x-small",
        color=INK,
        annotation_clip=False,
    )


def legend_above(ax: Axes, columns: int) -> None:
    """A legend in one line at the upper right, above the axes, where it covers no bar."""
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=columns,
        frameon=False,
        fontsize="x-small",
        borderaxespad=0,
        columnspacing=1,
    )


def legend_beside(ax: Axes) -> None:
    """A legend at the right, where it covers no curve."""
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
        fontsize="x-small",
        borderaxespad=0.2,
    )


def name_rows(ax: Axes, names: Sequence[str], at: NDArray[Any] | None = None) -> None:
    """Names along the vertical axis from the top down; only every k-th if there are many."""
    places = np.arange(len(names)) if at is None else at
    step = -(-len(names) // _MOST_NAMES)
    ax.set_yticks(places[::step], [shortened(name) for name in names[::step]])
    ax.invert_yaxis()


def shortened(name: str, most: int = 32) -> str:
    """A name of bounded length, which keeps its end, since the end distinguishes layers."""
    name = one_line(name)
    return literal(name if len(name) <= most else "…" + name[1 - most :])


def literal(text: str) -> str:
    """Text on one line, with control characters escaped and dollars that begin no formula."""
    return re.sub(r"(?<!\\)\$", r"\\$", one_line(text))


def diverging(backwards: bool = False) -> Any:
    """The colours of LC, with helping at the lower end; reversed if larger values are better."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = LIGHT.diverging[::-1] if backwards else LIGHT.diverging
    return LinearSegmentedColormap.from_list("lcray", stops)
