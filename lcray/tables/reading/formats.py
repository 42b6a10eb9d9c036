"""What a query answers, as text or Parquet: every digit kept."""

from __future__ import annotations

import io
import json
import math
import re
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
_SPECIAL = '[,"\\r\\n]'
_FORMULA = r"^[=+@\t\r-]"  # what a spreadsheet computes

_Change = Callable[[pa.StringArray], pa.StringArray]


def to_csv(table: pa.Table) -> bytes:
    """A header and the rows: nothing for null, nan, inf and -inf for numbers that are so.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    write_csv(table, text)
    return text.getvalue().encode()


def write_csv(table: pa.Table, text: TextIO) -> None:
    """`to_csv`, piece by piece into a text file that leaves line breaks as they are."""
    text.write(",".join(map(_field, table.column_names)) + "\n")
    for batch in _batches(table):
        fields = [_fields(column) for column in batch.columns]
        if len(fields) == 1:  # else a line that is empty, which readers skip
            fields = [pc.if_else(pc.equal(fields[0], ""), '""', fields[0])]
        lines = pc.binary_join_element_wise(*fields, ",")
        whole = pa.ListArray.from_arrays([0, len(lines)], lines)
        text.write(pc.binary_join(whole, "\n")[0].as_py() + "\n")


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


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    size = max(1, min(_ROWS, _TEXT // max(1, sum(map(_longest, table.columns)))))
    yield from (batch for batch in table.to_batches(max_chunksize=size) if batch.num_rows)


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    for batch in _batches(table):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _longest(column: pa.ChunkedArray) -> int:
    """The bytes of the longest string in a column: every row of a dictionary makes one anew."""
    chunks = [c.dictionary if pa.types.is_dictionary(c.type) else c for c in column.chunks]
    texts = [c for c in chunks if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
    return max((pc.max(pc.binary_length(text)).as_py() or 0 for text in texts), default=0)


def _objects(table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in _rows(table):
        yield dict(zip(table.column_names, map(_plain, row), strict=True))


def _fields(column: pa.Array) -> pa.Array:
    """The fields of a column, as text; as `_field` has them, by Arrow where it can."""
    kind = column.type
    if pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type):
        return _quoted(column.dictionary).take(column.indices).fill_null("")
    if pa.types.is_string(kind):
        return _quoted(column).fill_null("")
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.cast(pa.string()).fill_null("")
    if pa.types.is_float32(kind) or pa.types.is_float64(kind):
        return _numbers(column.cast(pa.float64())).fill_null("")
    return pa.array(map(_field, column.to_pylist()), pa.string())  # Arrow has pandas imported


def _quoted(text: pa.StringArray) -> pa.StringArray:
    formula = pc.match_substring_regex(text, _FORMULA)
    text = pc.if_else(formula, pc.binary_join_element_wise("'", text, ""), text)
    inner = pc.replace_substring(text, '"', '""')
    quoted = pc.binary_join_element_wise('"', inner, '"', "")
    return pc.if_else(pc.match_substring_regex(text, _SPECIAL), quoted, text)


def _numbers(column: pa.DoubleArray) -> pa.StringArray:
    """The shortest digits that give the same number, in the form that Python writes them in."""
    text, size = column.cast(pa.string()), pc.abs(column)
    whole = pc.and_(pc.equal(column, pc.trunc(column)), pc.less(size, 1e10))
    text = _changed(text, whole, lambda part: pc.binary_join_element_wise(part, ".0", ""))
    for low, high, change in ((5e-324, 1e-6, _tiny), (1e-6, 1e-4, _small), (1e10, 1e16, _large)):
        where = pc.and_(pc.greater_equal(size, low), pc.less(size, high))
        text = _changed(text, where, change)
    return text


def _changed(text: pa.StringArray, where: pa.BooleanArray, change: _Change) -> pa.StringArray:
    if not pc.any(where).as_py():
        return text
    return pc.replace_with_mask(text, where.fill_null(False), change(text.filter(where)))


def _tiny(text: pa.StringArray) -> pa.StringArray:
    return pc.replace_substring_regex(text, r"e-(\d)$", r"e-0\1")


def _small(text: pa.StringArray) -> pa.StringArray:
    """Of numbers that Arrow writes in full, as 0.00001234."""
    text = pc.replace_substring_regex(text, r"^(-?)0\.0000(0?)(\d)(\d*)$", r"\1\3.\4e-05\2")
    return pc.replace_substring(pc.replace_substring(text, ".e", "e"), "e-050", "e-06")


def _large(text: pa.StringArray) -> pa.StringArray:
    return pa.array([repr(float(number)) for number in text.to_pylist()], pa.string())


def _field(value: Any) -> str:
    """A value as a field of CSV."""
    text = "" if value is None else str(value)
    text = f"'{text}" if isinstance(value, str) and re.search(_FORMULA, text) else text
    return '"' + text.replace('"', '""') + '"' if re.search(_SPECIAL, text) else text


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
