"""Frames as tables, lines or JSON. Pure."""

from __future__ import annotations

import math

import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lcray.cli import terminal
from lcray.errors import visible


def frame_table(frame: pd.DataFrame, *, rows: int = 50) -> Table:
    """A frame as a table; numbers to six digits, at most `rows` rows."""
    table = Table(box=None, pad_edge=False)
    for name in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(
            visible(str(name)), justify="right" if numeric else "left", overflow="fold"
        )
    for row in frame.head(rows).itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    if len(frame) > rows:
        table.caption = f"{rows} of {len(frame)} rows"
    return table


def fitted(frame: pd.DataFrame, width: int, *, rows: int = 50) -> RenderableType:
    """`frame_table`, or one line per value where that is wider than `width`."""
    table = frame_table(frame, rows=rows)
    if width_of(table) <= width:
        return table
    names = [visible(str(name)) for name in frame.columns]
    longest = max(map(len, names))
    parts = [
        "\n".join(
            f"{name:{longest}}  {_cell(value)}" for name, value in zip(names, row, strict=True)
        )
        for row in frame.head(rows).itertuples(index=False)
    ]
    if len(frame) > rows:
        parts.append(f"{rows} of {len(frame)} rows")
    return Text("\n\n".join(parts))


def width_of(table: Table) -> int:
    """The columns that a table takes where nothing is folded."""
    # Both, or TERM may decide.
    return Console(width=terminal.WIDE, height=100).measure(table).maximum


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value))


def records(frame: pd.DataFrame) -> list[dict[str, object]]:
    """The rows for JSON, every digit kept; missing and non-finite values are None."""
    rows = frame.astype(object).to_dict("records")
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: object) -> object:
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
