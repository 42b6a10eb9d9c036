"""What a query answers, as text or Parquet: every digit kept."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lcray.errors import UsageError, one_line

_ROWS = 1 << 14  # made text at a time
_TEXT = 1 << 26  # bytes of strings among them
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet computes


def to_csv(table: pa.Table) -> bytes:
    """A header and the rows: nothing for null, nan, inf and -inf for numbers that are so.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    write_csv(table, text)
    return text.getvalue().encode()


def write_csv(table: pa.Table, text: TextIO) -> None:
    """`to_csv`, row by row into a text file that leaves line breaks as they are."""
    # csv puts into quotes only those line breaks that its own lines end in.
    writer = csv.writer(_Lines(text), lineterminator="\r\n")
    writer.writerow(map(_cell, table.column_names))
    for row in _rows(table):
        writer.writerow([_cell(value) for value in row])


class _Lines:
    """Lines that end in a line feed alone."""

    def __init__(self, text: TextIO) -> None:
        self._text = text

    def write(self, line: str) -> None:
        self._text.write(line[:-2] + "\n")


def to_json(table: pa.Table) -> bytes:
    """A list of objects; null for what is null or not finite, which JSON has no numbers for."""
    return (json.dumps([*_objects(table)], default=str, allow_nan=False) + "\n").encode()


def to_jsonl(table: pa.Table) -> bytes:
    """As `to_json`, an object a line."""
    lines = (json.dumps(row, default=str, allow_nan=False) for row in _objects(table))
    return "".join(line + "\n" for line in lines).encode()


def to_parquet(table: pa.Table) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


WRITERS: dict[str, Callable[[pa.Table], bytes]] = {
    "csv": to_csv,
    "json": to_json,
    "jsonl": to_jsonl,
    "parquet": to_parquet,
}


@contextmanager
def holding(form: str) -> Iterator[None]:
    """Turns the error that a type of SQL has no place in `form` into a `UsageError`."""
    try:
        yield
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise UsageError(
            f"SQL: {form} cannot hold this answer ({one_line(str(error))}); cast such columns, as "
            "in CAST(x AS VARCHAR)"
        ) from error


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    size = max(1, min(_ROWS, _TEXT // max(1, sum(map(_longest, table.columns)))))
    for batch in table.to_batches(max_chunksize=size):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _longest(column: pa.ChunkedArray) -> int:
    """The bytes of the longest string in a column: every row of a dictionary makes one anew."""
    chunks = [c.dictionary if pa.types.is_dictionary(c.type) else c for c in column.chunks]
    texts = [c for c in chunks if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
    return max((pc.max(pc.binary_length(text)).as_py() or 0 for text in texts), default=0)


def _objects(table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in _rows(table):
        yield dict(zip(table.column_names, map(_plain, row), strict=True))


def _cell(value: Any) -> Any:
    """What `csv` writes as it is; numbers keep every digit, and their sign."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """What JSON has; whole decimals, which sums of integers are, as integers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def distinct(names: list[str]) -> list[str]:
    """The names, those that recur (after a join) numbered."""
    taken, seen = set(names), set[str]()
    distinct = []
    for name in names:
        new, number = name, 2
        while new in seen or (new != name and new in taken):
            new, number = f"{name}_{number}", number + 1
        seen.add(new)
        distinct.append(new)
    return distinct
