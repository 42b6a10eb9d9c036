"""The parts of a page: figures and sections, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from lcray.errors import one_line
from lcray.figures.palette import DARK, LIGHT, by_depth

#: The unit of LC in words.
LOSS = "units of the loss (nats for cross-entropy)"


@dataclass(frozen=True)
class Figure:
    """A chart with the numbers in it.

    Attributes:
        traces: Plotly's, with references of `lcray.figures.html.store` for arrays and ``@role`` for
            colours, which the page resolves for its light and dark themes.
        layout: Plotly's, with the same references; ``names`` of an axis are labels of 0, 1, …,
            shortened to fit.
        height: pixels.
        columns: of the table view, from `lcray.figures.html.store.column`.
        rows: number of rows of the table view.
    """

    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int
    columns: Sequence[Mapping[str, Any]]
    rows: int


@dataclass(frozen=True)
class Control:
    """A choice above a chart.

    Attributes:
        label: in words.
        options: their names; a figure's key contains their numbers.
    """

    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Section:
    """One chart, or a choice of charts, with the text that a reader needs.

    Attributes:
        says: what the chart shows, in one sentence.
        reading: how to read it, in one sentence.
        tables: the names of the tables that it is made from.
        sql: a query that gives its numbers.
        figures: by key: the numbers of the split and of the choices, separated by dots.
        by_split: whether the key contains a split.
        controls: the choices.
        time: whether the x axis is the step, so that the slider marks it.
        notes: further lines.
        title: a heading; empty for that of `lcray.figures.html.report.SECTIONS`.
        id: used in addresses; as above.
    """

    says: str
    reading: str
    tables: Sequence[str]
    sql: str
    figures: Mapping[str, Figure]
    by_split: bool = True
    controls: Sequence[Control] = ()
    time: bool = False
    notes: Sequence[str] = ()
    title: str = ""
    id: str = ""

    def data(self) -> dict[str, Any]:
        """The section's data for the page's script."""
        return {
            "id": self.id,
            "title": self.title,
            "bySplit": self.by_split,
            "controls": [asdict(control) for control in self.controls],
            "time": self.time,
            "figures": {key: asdict(figure) for key, figure in self.figures.items()},
        }


@dataclass(frozen=True)
class Absent:
    """A section that an output's tables cannot give.

    Attributes:
        id: as in a section.
        title: as in a section.
        reason: why, and how to obtain it.
    """

    id: str
    title: str
    reason: str


def plotted(name: str) -> str:
    """A name that Plotly shows unchanged, although it takes text for a simple HTML."""
    return escape(one_line(name), quote=False)


def category(k: int) -> str:
    """The colour of the k-th of several things without an order; colours repeat."""
    return f"@s{k % len(LIGHT.categories)}"


def depths(n: int) -> list[str]:
    """Colours of n layers in the model's order, each for both themes."""
    return [f"@{a}|{b}" for a, b in zip(by_depth(n, LIGHT), by_depth(n, DARK), strict=True)]


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, for readers."""
    return _typeset(f"{value:+.{digits}g}")


def plain(value: float, digits: int = 3) -> str:
    """A number for readers."""
    return _typeset(f"{value:.{digits}g}")


def _typeset(text: str) -> str:
    """A number with a true minus and a short exponent; a dash if there is no number."""
    if "nan" in text:
        return "–"
    digits, e, exponent = text.partition("e")
    return (digits + (f"e{int(exponent)}" if e else "")).replace("-", "−")


#: The least share of the loss change for which a layer is named.
MATERIAL = 0.01


def percent(part: float, whole: float, digits: int = 3) -> str:
    """A share in percent, for readers."""
    if not whole or part != part or whole != whole:
        return "–"
    return plain(100 * part / whole, digits) + "\N{NO-BREAK SPACE}%"


def count(number: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, joined as in a sentence."""
    shown = [one_line(name) for name in names[:most]]
    if len(names) > most:
        return ", ".join(shown) + f" and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def bars_height(rows: int, each: int = 22, least: int = 180) -> int:
    """The height in pixels of a chart with this number of rows."""
    each = each if rows <= 30 else max(12, each * 30 // rows)
    return max(least, min(2400, 70 + each * rows))
