"""What a page is made of: figures and sections, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
            colours, which the page knows for light and dark.
        layout: Plotly's, likewise; ``names`` of an axis are labels of 0, 1, …, shortened to fit.
        height: pixels.
        columns: of the table view, from `lcray.figures.html.store.column`.
        rows: of it.
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
        options: their names; a figure's key has their numbers.
    """

    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Section:
    """One chart, or a choice of charts, with what a reader needs to read it.

    Attributes:
        id: in addresses.
        title: a heading.
        says: what it shows, a sentence.
        reading: how to read it, a sentence.
        tables: the names of the tables behind it.
        sql: what gives its numbers.
        figures: by key: the numbers of split and choices, with dots between.
        by_split: whether the key has a split.
        controls: the choices.
        time: whether the x axis is the step, so that the scrubber marks it.
        notes: further lines.
    """

    id: str
    title: str
    says: str
    reading: str
    tables: Sequence[str]
    sql: str
    figures: Mapping[str, Figure]
    by_split: bool = True
    controls: Sequence[Control] = ()
    time: bool = False
    notes: Sequence[str] = field(default=())

    def data(self) -> dict[str, Any]:
        """What the page's script needs of it."""
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
        id: as of a section.
        title: likewise.
        reason: why, and what would give it.
    """

    id: str
    title: str
    reason: str


def plotted(name: str) -> str:
    """A name as Plotly shows it as it is: it takes text for a small HTML."""
    return escape(one_line(name), quote=False)


def category(k: int) -> str:
    """The colour of the k-th of things without an order, begun again after the last."""
    return f"@s{k % len(LIGHT.categories)}"


def depths(n: int) -> list[str]:
    """Colours of n layers in the model's order, each for both themes."""
    return [f"@{a}|{b}" for a, b in zip(by_depth(n, LIGHT), by_depth(n, DARK), strict=True)]


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, for people."""
    return _typeset(f"{value:+.{digits}g}")


def plain(value: float, digits: int = 3) -> str:
    """A number for people."""
    return _typeset(f"{value:.{digits}g}")


def _typeset(text: str) -> str:
    """A number with a true minus, and no zeros before its exponent; a dash where there is none."""
    if "nan" in text:
        return "–"
    digits, e, exponent = text.partition("e")
    return (digits + (f"e{int(exponent)}" if e else "")).replace("-", "−")


#: A share of the loss change below which a layer is not named for it.
MATERIAL = 0.01


def percent(part: float, whole: float, digits: int = 3) -> str:
    """A share for people."""
    if not whole or part != part or whole != whole:
        return "–"
    return plain(100 * part / whole, digits) + "\N{NO-BREAK SPACE}%"


def count(number: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, the first few."""
    shown = [one_line(name) for name in names[:most]]
    if len(names) > most:
        return ", ".join(shown) + f" and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def bars_height(rows: int, each: int = 22, least: int = 180) -> int:
    """Pixels of a chart of so many rows."""
    each = each if rows <= 30 else max(12, each * 30 // rows)
    return max(least, min(2400, 70 + each * rows))
