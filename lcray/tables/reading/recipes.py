"""Advice if an output lacks a table, or a query cannot be answered."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lcray.tables.reading.views import VIEWS, named_in, views_of
from lcray.tables.schema import TABLES

#: How to obtain each table that an output may lack.
OPTIONS = {
    "elements": "analyze with --elements",
    "parameters": "analyze with --parameters",
    "traces": "analyze with --parameters",
    "fisher": "analyze with --fisher",
    "units": "analyze with --units",
    "groups": "give the task groups, and analyze",
    "replicates": "analyze with --samples",
    "replicate_layers": "analyze with --samples",
}


def recipe_for(table: str) -> str:
    """How to obtain a missing table, in a few words."""
    return f"{OPTIONS.get(table, 'analyze')} into a new output"


#: Columns with names that are words of SQL, and a pattern for their use without quotes.
RESERVED = {
    "group": re.compile(r"""(?i)(?<![\w"'.])group(?![\w"']|\s+by\b)"""),
    "window": re.compile(r"""(?i)(?<![\w"'.])window(?![\w"']|\s+\w+\s+as\b)"""),
}


def quotes_for(query: str) -> str | None:
    """Advice on a query that does not parse, if it names such a column without quotes."""
    for name, unquoted in RESERVED.items():
        if unquoted.search(query):
            return f'a column named {name} is written "{name}", in quotes'
    return None


def tables_for(query: str, tables: Sequence[str], out: object) -> str | None:
    """Advice on a query for a table or view that is missing in `out`, which has `tables`."""
    for name in named_in(query, [t for t in TABLES if t not in tables]):
        return f"there is no table {name!r} in {out}: {_how(name)}"
    for view in VIEWS:
        if view not in views_of(tables) and named_in(query, [view.name]):
            absent = next(table for table in view.tables if table not in tables)
            return f"view {view.name!r} needs the table {absent!r}: {_how(absent)}"
    return None


def _how(table: str) -> str:
    return OPTIONS.get(table, "see lcray analyze --help")
