"""The findings in short, and how to read them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from lcray.analyses.findings import Findings
from lcray.analyses.registry import FINDINGS
from lcray.analyses.tidy import notes_of
from lcray.analyses.titles import EMPTY, READING, WHAT_HAPPENED
from lcray.cli import terminal
from lcray.cli.display.frames import frame_table, width_of
from lcray.errors import visible

_BRIEF = 24  # rows of a finding that its summary shows


def findings_summary(found: Findings, width: int = terminal.WIDE) -> Group:
    """The rows of every finding about the whole run, and why others are not available.

    Of several splits, only the first; and only as many columns as fit into `width`.
    """
    parts: list[RenderableType] = []
    left_out: dict[str, None] = {}
    for finding in FINDINGS:
        if finding.name not in found or not finding.brief:
            continue
        table = found[finding.name]
        frame = table.to_pandas()
        for column, value in finding.rows:
            frame = frame[frame[column] == value]
        frame = frame[[*finding.shown]]
        if "split" in frame and len(frame):
            first, *others = map(str, frame["split"].unique())
            frame = frame[frame["split"] == first]
            left_out |= dict.fromkeys(others)
        if "layer" in frame:
            frame = frame.assign(layer=frame["layer"].astype(object).replace("", "all"))
        narrow = _narrowed(frame.head(_BRIEF), width)
        parts += [Text(f"{finding.title} ({finding.name})", "italic"), frame_table(narrow)]
        if len(narrow.columns) < len(frame.columns):
            parts.append(Text(f"and {', '.join(map(str, frame.columns[len(narrow.columns) :]))}"))
        if len(frame) > _BRIEF:
            file = f"{found.path}/{finding.name}.parquet"
            parts.append(Text(f"{_BRIEF} of {len(frame)} rows; all: {file}"))
        parts += [Text(line, "dim") for line in _explained(finding.name, narrow)]
        parts += [Text(visible(note), "yellow") for note in notes_of(table)] + [""]
    parts += [Text(f"no {n}: {visible(why)}", "yellow") for n, why in found.impossible.items()]
    parts += [WHAT_HAPPENED] if parts else []
    more = visible(f"; also of split {', '.join(left_out)}" if left_out else "")
    parts.append(f"findings, all rows and columns{more}: {found.path}/*.parquet")
    return Group(*parts)


def _explained(name: str, shown: pd.DataFrame) -> Iterable[str]:
    """How to read a finding's table, and what its empty cells mean; one line each, or none."""
    if name in READING:
        yield READING[name]
    known = [(c, meaning) for c, meaning in EMPTY.get(name, {}).items() if c in shown]
    empty = [f"no {column}: {meaning}" for column, meaning in known if shown[column].isna().any()]
    if empty:
        yield "; ".join(empty)


def _narrowed(frame: pd.DataFrame, width: int) -> pd.DataFrame:
    """The first columns, as many as fit."""
    for n_columns in range(len(frame.columns), 1, -1):
        narrow = frame[frame.columns[:n_columns]]
        if width_of(frame_table(narrow)) <= width:
            return narrow
    return frame[frame.columns[:1]]
