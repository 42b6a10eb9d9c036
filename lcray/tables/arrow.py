"""Arrow tables with the schema of a table, from arrays and scalars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lcray.errors import suggest
from lcray.tables.columns import STRING
from lcray.tables.schema import table_schema


def make_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """An Arrow table with the schema of the table called `name`.

    Args:
        name: the name of the table.
        columns: by name, each an array, list or Arrow array [n], or a scalar (repeated n times). A
            string column may be one string or a pair (codes [n], names). NaN and ±inf become null;
            a missing column is null if its type allows that.

    Raises:
        UsageError: if there is no such table.
        ValueError: for an unknown or missing column, lengths that differ, values that do not fit
            the type, or nulls where the type has none.
    """
    return fill(name, table_schema(name).schema, columns)


def fill(name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """As `make_table`, for any `schema`; errors call the table `name`."""
    unknown = [column for column in columns if column not in schema.names]
    if unknown:
        raise ValueError(suggest(unknown[0], schema.names, f"column of {name!r}"))
    lengths = {column: n for column, v in columns.items() if (n := _length(v)) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"table {name!r}: columns differ in length: {lengths}")
    rows = next(iter(lengths.values()), 1)
    arrays = [_array(name, field, columns.get(field.name), rows) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _length(value: Any) -> int | None:
    """The number of rows of a column, None for a scalar."""
    if isinstance(value, tuple):
        value = value[0]
    if value is None or isinstance(value, str) or np.ndim(value) == 0:
        return None
    return len(value)


def _array(table: str, field: pa.Field, value: Any, rows: int) -> pa.Array:
    try:
        if value is None:
            array = pa.nulls(rows, field.type)
        elif pa.types.is_dictionary(field.type):
            array = _strings(value, rows)
        elif pa.types.is_floating(field.type):
            array = _floats(value, rows, field.type)
        else:
            array = _exact(value, rows, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"table {table!r}: column {field.name!r}: {error}") from error
    if array.null_count and not field.nullable:
        raise ValueError(f"table {table!r}: column {field.name!r} must not be missing or null")
    return array


def _strings(value: Any, rows: int) -> pa.Array:
    if isinstance(value, str):
        value = (np.zeros(rows, np.int32), [value])
    if isinstance(value, tuple):
        codes, names = value
        if np.ndim(codes) == 0:
            codes = np.full(rows, codes)
        indices = pa.array(np.asarray(codes)).cast(pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
    array = value if isinstance(value, pa.Array) else pa.array(value, pa.string())
    if not pa.types.is_dictionary(array.type):
        array = array.cast(pa.string()).dictionary_encode()
    return array.cast(STRING)


def _floats(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    dtype = kind.to_pandas_dtype()
    if isinstance(value, pa.Array | pa.ChunkedArray):
        value = np.asarray(value.cast(kind))
    with np.errstate(over="ignore"):  # beyond the type's range is infinite, hence null
        values = np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))
    finite = np.isfinite(values)
    return pa.array(values, kind, mask=None if finite.all() else ~finite)


def _exact(value: Any, rows: int, kind: pa.DataType) -> pa.Array:
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
    if isinstance(value, pa.Array):
        return value.cast(kind)
    if isinstance(value, list):
        return pa.array(value).cast(kind)  # unlike pa.array(value, kind), refuses fractions
    values = np.asarray(value)
    return pa.array(np.ascontiguousarray(np.broadcast_to(values, (rows,)))).cast(kind)


def largest_group(metadata: pq.FileMetaData) -> int:
    """The largest number of rows of a row group; memory is reserved for it before reading."""
    groups = range(metadata.num_row_groups)
    return max((metadata.row_group(group).num_rows for group in groups), default=0)
