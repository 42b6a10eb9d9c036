"""The tables: columns, units, descriptions, keys, and how each is stored in Parquet.

Tables are tidy: one fact per row, flat columns. Rows are sorted by key: splits in the plan's order,
layers in the model's order, everything else ascending. Numbers that are not finite are stored as
null; the column `status` of `intervals` gives the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lcray.errors import UsageError, suggest
from lcray.storage.files import FORMAT_VERSION
from lcray.tables.columns import (
    BORDERS,
    ELEMENTS,
    FISHER,
    FITS,
    GROUPS,
    HISTOGRAMS,
    INTERVALS,
    LAYERS,
    PARAMETERS,
    REPLICATE_LAYERS,
    REPLICATES,
    TRACES,
    UNITS,
)

#: The value of `window` in `fits` that stands for the whole run.
WHOLE_RUN = -1


@dataclass(frozen=True)
class TableSchema:
    """The columns of one table, and how it is stored.

    Attributes:
        name: the name of the table.
        key: the columns that identify a row, in the order by which rows are sorted.
        schema: the Arrow schema; metadata of the fields hold ``unit`` and ``description``, those of
            the schema the format version and the table's name, description and key.
        description: one line.
        partition: key columns that are constant within a row group of a shard.
        row_group_size: number of rows in a full row group.
    """

    name: str
    key: tuple[str, ...]
    schema: pa.Schema
    description: str
    partition: tuple[str, ...]
    row_group_size: int

    def absent(self, found: pa.Schema) -> tuple[str, ...]:
        """The columns that a file lacks since an earlier lcray wrote it; they count as null.

        Args:
            found: the schema of the file.

        Raises:
            ValueError: if it has columns that the table never had, or lacks others.
        """
        there = [field for field in self.schema if field.name in found.names]
        lacking = [field for field in self.schema if field.name not in found.names]
        if not pa.schema(there).equals(found) or any(_since(field) is None for field in lacking):
            raise ValueError("other columns than the table has")
        return tuple(field.name for field in lacking)

    def completed(self, rows: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a file of an earlier lcray, with null for the columns that it lacks.

        Args:
            rows: the wanted columns that the file has.
            columns: the wanted columns, in order; None for all.
        """
        wanted = self.schema.names if columns is None else list(columns)
        if wanted == rows.column_names:
            return rows
        fields = [self.schema.field(name) for name in wanted]
        arrays = [
            rows.column(field.name)
            if field.name in rows.column_names
            else pa.nulls(rows.num_rows, field.type)
            for field in fields
        ]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    @property
    def write_options(self) -> dict[str, Any]:
        """Keyword arguments of `pyarrow.parquet.ParquetWriter`.

        Only strings use dictionaries, so that every other column has its own encoding: split bytes
        for floats, deltas for integers.
        """
        strings = [f.name for f in self.schema if pa.types.is_dictionary(f.type)]
        encodings = {f.name: _encoding(f.type) for f in self.schema}
        options: dict[str, Any] = {
            "compression": "zstd",
            "compression_level": 1,
            "use_dictionary": strings,
            "column_encoding": {name: code for name, code in encodings.items() if code},
            "data_page_size": 2 << 20,
            "store_schema": True,
        }
        if "max_rows_per_page" in inspect.signature(pq.ParquetWriter).parameters:
            options["max_rows_per_page"] = 1 << 18  # older writers do not limit the rows of a page
        return options


def _since(field: pa.Field) -> str | None:
    """The first version of lcray that writes a column; None if all do."""
    since = (field.metadata or {}).get(b"since")
    return None if since is None else since.decode()


def _encoding(kind: pa.DataType) -> str | None:
    if pa.types.is_floating(kind):
        return "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if pa.types.is_integer(kind) else None


def _table(
    name: str,
    key: str,
    columns: Iterable[pa.Field],
    description: str,
    partition: str = "split",
    row_group_size: int = 1 << 17,
) -> TableSchema:
    metadata = {
        "lcray.format_version": str(FORMAT_VERSION),
        "lcray.table": name,
        "lcray.description": description,
        "lcray.key": ",".join(key.split()),
    }
    schema = pa.schema(list(columns), metadata=metadata)
    parts = tuple(partition.split())
    later = {field.name for field in schema if _since(field) is not None}
    assert later.isdisjoint((*key.split(), *parts)), "keys and partitions are in all files"
    return TableSchema(name, tuple(key.split()), schema, description, parts, row_group_size)


_ALL = (
    _table("intervals", "split start_step", INTERVALS, "loss and LC of every interval"),
    _table("layers", "split start_step layer", LAYERS, "LC of every layer and interval"),
    _table("units", "split start_step layer unit", UNITS, "LC of every unit and interval"),
    _table("groups", "split start_step layer group", GROUPS, "LC of the mean loss of each group"),
    _table(
        "replicates",
        "split start_step replicate",
        REPLICATES,
        "loss and LC of every replicate of a sample, which say how far estimates may be off",
    ),
    _table(
        "replicate_layers",
        "split start_step layer replicate",
        REPLICATE_LAYERS,
        "LC of every layer on every replicate of a sample",
    ),
    _table(
        "histograms",
        "split window layer sign bin",
        HISTOGRAMS,
        "absolute LC of the elements of a layer, interval by interval, on a logarithmic scale",
    ),
    _table(
        "parameters",
        "split layer index",
        PARAMETERS,
        "every element of a parameter over the run; buffers have LC in layers alone",
        "split layer",
        1 << 18,
    ),
    _table(
        "traces",
        "split layer index step",
        TRACES,
        "weight, gradient and LC of a sample of elements, step by step",
        "split layer",
    ),
    _table(
        "elements",
        "split layer start_step index",
        ELEMENTS,
        "LC of every element of a parameter and interval; buffers have LC in layers alone",
        "split start_step layer",
        1 << 20,
    ),
    _table(
        "fisher",
        "split step layer",
        FISHER,
        "trace of the Fisher information of every layer that is trained",
    ),
    _table(
        "fits",
        "split window layer sign distribution parameter",
        FITS,
        "distributions fitted to the absolute LC of the elements of a layer",
    ),
    _table(
        "borders",
        "split layer index",
        BORDERS,
        "signs in a span's first and last interval (internal: shards only)",
        "split layer",
        1 << 18,
    ),
)

#: Every table by name; `borders` exists in shards only, `fits` in the reduced tables only.
TABLES: Mapping[str, TableSchema] = MappingProxyType({table.name: table for table in _ALL})


def table_schema(name: str) -> TableSchema:
    """The schema of the table called `name`.

    Raises:
        UsageError: if there is no such table; the message names the nearest name.
    """
    if name not in TABLES:
        raise UsageError(suggest(name, [n for n in TABLES if n != "borders"], "table"))
    return TABLES[name]
