"""Tables as CSV, with what their columns are in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from lcray.answers import write_csv
from lcray.errors import UsageError, suggest
from lcray.results import Results
from lcray.schema import TABLES

#: Type, unit and description of every column.
COLUMNS = "columns.json"


def write_csv_files(
    results: Results, folder: Path, tables: Iterable[str] | None
) -> tuple[Path, ...]:
    """``<table>.csv`` each, and ``columns.json``; raises as `lcray.export`."""
    chosen = list(results.tables if tables is None else dict.fromkeys(tables))
    for table in chosen:
        if table not in results.tables:
            raise UsageError(suggest(table, results.tables, "table"))
    written = []
    for table in chosen:
        path = folder / f"{table}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            write_csv(results.arrow(table), file)
        written.append(path)
    about = {
        table: {field.name: _about(field) for field in TABLES[table].schema} for table in chosen
    }
    path = folder / COLUMNS
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return (*written, path)


def _about(field: pa.Field) -> dict[str, str]:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    words = {key: field.metadata[key.encode()].decode() for key in ("unit", "description")}
    return {"type": str(kind), **words}
