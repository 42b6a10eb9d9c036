"""The command `lcray query`."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import click

from lcray.cli import terminal
from lcray.cli.options import OUT, command
from lcray.cli.signals import leaving_at_once
from lcray.errors import UsageError
from lcray.storage.interrupt import Stopped

if TYPE_CHECKING:
    import pandas as pd

    from lcray.tables.reading.results import Results

_SELECT = re.compile(r"\s*(select|with|from)\b", re.IGNORECASE)
_FORMS = ("table", "csv", "json", "jsonl", "parquet")


@command(
    "lcray query out/mine",
    'lcray query out/mine "SELECT layer, sum(lc) AS lc FROM layers GROUP BY ALL ORDER BY lc"',
    'lcray query out/mine "SELECT * FROM layers" --format parquet --output layers.parquet',
)
@OUT
@click.argument("sql", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMS),
    default="table",
    show_default=True,
    help="Format of the answer; table rounds, stops at 50 rows and says so, and writes a line per "
    "value where too wide; the others keep every digit and row.",
)
@click.option("--output", help="Write the answer to this file, or address, instead.")
def query(out: str, sql: str | None, form: str, output: str | None) -> None:
    """Run one SELECT on the tables and views of OUT, read-only, in DuckDB.

    Without SQL: list the tables and views that OUT has.
    """
    if _SELECT.match(out) and not _SELECT.match(sql or ""):
        raise UsageError('query: the output comes first, then the SELECT: lcray query OUT "…"')
    if form == "parquet" and output is None and sys.stdout.isatty():
        raise UsageError("parquet is binary: give --output FILE, or send it to a file or a pipe")
    if form == "table" and output is not None:
        raise UsageError(
            "--output: give --format csv, json, jsonl or parquet; table is for the screen only"
        )
    with leaving_at_once():
        import pandas as pd  # noqa: F401 - slow to import, as is DuckDB

        if sql is not None:
            import duckdb  # noqa: F401

        from lcray.tables.reading.results import open_output

        results = open_output(out)
    try:
        _answer(results, _text(sql), form, output)
    except KeyboardInterrupt as error:  # whichever signal: a query leaves nothing undone
        raise Stopped from error


def _answer(results: Results, sql: str | None, form: str, output: str | None) -> None:
    import pyarrow as pa

    from lcray.tables.reading.formats import WRITERS, distinct, holding

    if form == "table":
        _show(results.contents() if sql is None else results.sql(sql))
        return
    if sql is None:
        found = pa.Table.from_pandas(results.contents(), preserve_index=False)
    else:
        found = results.sql_arrow(sql)
        found = found.rename_columns(distinct(found.column_names))
    with holding(form):
        data = WRITERS[form](found)
    if output is not None:
        _store(data, output, results)
    else:
        _print(data)


def _text(sql: str | None) -> str | None:
    """The query, of UTF-8 also where the locale takes arguments for ASCII."""
    escaped = sql is not None and any("\ud800" <= character <= "\udfff" for character in sql)
    return os.fsencode(sql).decode("utf-8", "surrogateescape") if sql and escaped else sql


def _show(frame: pd.DataFrame) -> None:
    from lcray.cli.display.frames import fitted

    console = terminal.console()
    console.print(fitted(frame, console.width))


def _print(data: bytes) -> None:
    if sys.stdout.isatty():
        terminal.say(data.decode(), end=False)
    else:
        click.echo(data, nl=False)  # always UTF-8, so that no data is lost


def _store(data: bytes, output: str, results: Results) -> None:
    from lcray.storage import place, storage_of
    from lcray.storage.files import writing

    path = results.output.beside(place(output))
    with writing(path):
        storage_of(path).write(path, data)
    terminal.say(f"{path}: {len(data):,} bytes", err=True)
