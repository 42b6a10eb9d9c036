"""Tables as CSV, with a file that describes their columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa

from lcray.errors import UsageError, suggest
from lcray.tables.reading.formats import write_csv
from lcray.tables.reading.results import Results
from lcray.tables.schema import TABLES

#: Type, unit and description of every column.
COLUMNS = "columns.json"


def write_csv_files(
    results: Results, folder: Path, tables: Iterable[str] | None
) -> tuple[Path, ...]:
    """Write ``<table>.csv`` for each table, and ``columns.json``; raises as `lcray.export`."""
    chosen = list(results.tables if tables is None else dict.fromkeys(tables))
    for table in chosen:
        if table not in results.tables:
            raise UsageError(suggest(table, results.tables, "table"))
    for name in (*(f"{table}.csv" for table in chosen), COLUMNS):
        results.output.beside(folder / name)
    written = []
    for table in chosen:
        path = folder / f"{table}.csv"
        with _whole(path) as file:
            write_csv(results.arrow(table), file)
        written.append(path)
    about = {
        table: {field.name: _about(field) for field in TABLES[table].schema} for table in chosen
    }
    path = folder / COLUMNS
    with _whole(path) as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return (*written, path)


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that gets its name once it is whole; it replaces an existing file or link."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # from an export that was killed, or a link
    try:
        with partial.open("x", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _about(field: pa.Field) -> dict[str, str]:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    words = {key: field.metadata[key.encode()].decode() for key in ("unit", "description")}
    return {"type": str(kind), **words}
