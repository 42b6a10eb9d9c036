"""The answer of a query as text or Parquet, with all digits."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lcray.errors import UsageError, one_line

_ROWS = 1 << 14  # rows that are converted to text at a time
_TEXT = 1 << 26  # bytes of strings in these rows, at most
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes such text for a formula


def to_csv(table: pa.Table) -> bytes:
    """A header and the rows; null is empty, and other numbers may be nan, inf and -inf.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    write_csv(table, text)
    return text.getvalue().encode()


def write_csv(table: pa.Table, text: TextIO) -> None:
    """As `to_csv`, piece by piece into a text file that does not translate line breaks."""
    # csv quotes only line breaks that occur in its own line terminator.
    writer = csv.writer(_Lines(text), lineterminator="\r\n")
    writer.writerow(map(_cell, table.column_names))
    for batch in _batches(table):
        writer.writerows(zip(*map(_cells, batch.columns), strict=True))


class _Lines:
    """Ends lines with a line feed alone."""

    def __init__(self, text: TextIO) -> None:
        self._text = text

    def write(self, line: str) -> None:
        self._text.write(line[:-2] + "\n")


def to_json(table: pa.Table) -> bytes:
    """A list of objects; values that are null or not finite are null, since JSON has no others."""
    return (json.dumps([*_objects(table)], default=str, allow_nan=False) + "\n").encode()


def to_jsonl(table: pa.Table) -> bytes:
    """As `to_json`, one object per line."""
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
    """Turns the error of a type of SQL that `form` cannot hold into a `UsageError`."""
    try:
        yield
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise UsageError(
            f"SQL: {form} cannot hold this answer ({one_line(str(error))}); cast such columns, as "
            "in CAST(x AS VARCHAR)"
        ) from error


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    size = max(1, min(_ROWS, _TEXT // max(1, sum(map(_longest, table.columns)))))
    yield from (batch for batch in table.to_batches(max_chunksize=size) if batch.num_rows)


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    for batch in _batches(table):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _longest(column: pa.ChunkedArray) -> int:
    """Bytes of the longest string in a column; each row of a dictionary makes a new copy."""
    chunks = [c.dictionary if pa.types.is_dictionary(c.type) else c for c in column.chunks]
    texts = [c for c in chunks if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
    return max((pc.max(pc.binary_length(text)).as_py() or 0 for text in texts), default=0)


def _objects(table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in _rows(table):
        yield dict(zip(table.column_names, map(_plain, row), strict=True))


def _cells(column: pa.Array) -> Iterable[Any]:
    """The values of a column as `_cell` has them; each text of a dictionary is made once."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        texts = [*map(_cell, column.dictionary.to_pylist()), None]
        return [texts[i] for i in column.indices.fill_null(-1).to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return [*column.to_pylist()]
    return map(_cell, column.to_pylist())


def _cell(value: Any) -> Any:
    """A value that `csv` writes unchanged; it keeps all digits of numbers, and their sign."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    if isinstance(value, bool):
        return str(value).lower()
    return value


def _plain(value: Any) -> Any:
    """A value that JSON has; whole decimals, such as sums of integers, become integers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def distinct(names: list[str]) -> list[str]:
    """The names; repeated ones (after a join) get a number."""
    taken, seen = set(names), set[str]()
    distinct = []
    for name in names:
        new, number = name, 2
        while new in seen or (new != name and new in taken):
            new, number = f"{name}_{number}", number + 1
        seen.add(new)
        distinct.append(new)
    return distinct
